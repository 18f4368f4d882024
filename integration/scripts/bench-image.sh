#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes an image for `bench start` as an OCI layout DIR/NAME, and the Debian below it once as DIR/debian.
# NAME: nginx python node java postgres ml. Its command is /srv/start: prints a line first, then starts the service on
# port $PORT, or works and prints what it did. Keeps what is there; needs root, debootstrap, umoci.
# Usage: bench-image.sh DIR NAME
set -euo pipefail
dir=${1:?usage: bench-image.sh DIR NAME} name=${2:?usage: bench-image.sh DIR NAME}
layout=$dir/$name
[ -e "$layout/.complete" ] && exit 0
[ "$name" = debian ] || "$0" "$dir" debian
work=$(mktemp -d "${TMPDIR:-/tmp}/sluice-image.XXXXXX")
root=$work/bundle/rootfs
cleanup() {
  umount -q "$root/proc" 2>/dev/null || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
rm -rf "$layout"
mkdir -p "$dir"
say() { printf '   image %s: %s\n' "$name" "$*"; }
quietly() { "$@" >>"$work/log" 2>&1 || { tail -30 "$work/log" >&2; return 1; }; }
# Runs a command inside the image with no service started and nothing of the host visible.
inside() {
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  mount -t proc proc "$root/proc"
  TMPDIR=/tmp DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin quietly chroot "$root" "$@"
  umount "$root/proc"
  rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/log/apt "$root"/var/log/dpkg.log
}
install() { inside apt-get -q -y --no-install-recommends install "$@"; }
layer() {
  quietly umoci repack --refresh-bundle --image "$layout:latest" --history.created_by "$1" "$work/bundle"
  say "layer: $1"
}
# The image's command, from standard input.
start() {
  mkdir -p "$root/srv"
  { printf '#!/bin/sh\necho starting\n'; cat; } >"$root/srv/start"
  chmod 755 "$root/srv/start"
}
if [ "$name" = debian ]; then
  quietly umoci init --layout "$layout"
  quietly umoci new --image "$layout:latest"
else
  cp -r "$dir/debian" "$layout"
  rm "$layout/.complete"
fi
quietly umoci unpack --image "$layout:latest" "$work/bundle"
case $name in
debian)
  say "debootstrap (a minute or two)"
  quietly debootstrap --variant=minbase bookworm "$root"
  printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
  chmod 755 "$root/usr/sbin/policy-rc.d"
  inside apt-get -q update
  layer "debian minbase"
  ;;
nginx)
  install nginx-light
  layer "nginx"
  install ca-certificates tzdata curl
  layer "certificates and tools"
  echo "<h1>It works</h1>" >"$root/var/www/html/index.html"
  start <<'SH'
printf 'daemon off; pid /tmp/nginx.pid; error_log stderr; events {}\nhttp { access_log off; include /etc/nginx/mime.types;\n  server { listen 127.0.0.1:%s; root /var/www/html; } }\n' "$PORT" >/tmp/nginx.conf
exec nginx -c /tmp/nginx.conf
SH
  layer "site"
  ;;
python)
  install python3 ca-certificates
  layer "python"
  install python3-numpy
  layer "numpy"
  install python3-flask python3-requests
  layer "frameworks"
  cat >"$root/srv/app.py" <<'PY'
import os
import flask, numpy, requests
app = flask.Flask("app")
@app.get("/")
def root():
    return {"det": float(numpy.linalg.det(numpy.eye(3) * 2.0)), "requests": requests.__version__}
app.run("127.0.0.1", int(os.environ["PORT"]))
PY
  start <<'SH'
exec python3 /srv/app.py
SH
  layer "application"
  ;;
node)
  install nodejs ca-certificates
  layer "node"
  install node-express
  layer "express"
  cat >"$root/srv/app.js" <<'JS'
const app = require("/usr/share/nodejs/express")();
app.get("/", (request, response) => response.json({ works: true }));
app.listen(Number(process.env.PORT), "127.0.0.1");
JS
  start <<'SH'
exec node /srv/app.js
SH
  layer "application"
  ;;
java)
  mkdir -p "$root/usr/share/man/man1"
  install ca-certificates tzdata
  layer "certificates"
  install openjdk-17-jre-headless
  layer "JVM"
  mkdir -p "$root/srv/app"
  cat >"$root/srv/app/App.java" <<'JAVA'
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;

public class App {
  public static void main(String[] arguments) throws Exception {
    int port = Integer.parseInt(System.getenv("PORT"));
    HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", port), 0);
    server.createContext("/", exchange -> {
      byte[] body = "It works\n".getBytes(StandardCharsets.UTF_8);
      exchange.sendResponseHeaders(200, body.length);
      exchange.getResponseBody().write(body);
      exchange.close();
    });
    server.start();
  }
}
JAVA
  # The compiler is here for a moment, and in no layer.
  install openjdk-17-jdk-headless
  inside javac -d /srv/app /srv/app/App.java
  inside apt-get -q -y purge openjdk-17-jdk-headless
  start <<'SH'
exec java -cp /srv/app App
SH
  layer "application"
  ;;
postgres)
  install ca-certificates tzdata
  layer "certificates"
  install postgresql-15
  layer "postgresql"
  mkdir -p "$root/srv/data"
  inside chown postgres:postgres /srv/data
  inside setpriv --reuid=postgres --regid=postgres --clear-groups \
    /usr/lib/postgresql/15/bin/initdb -D /srv/data --auth=trust --encoding=UTF8 --locale=C.UTF-8
  start <<'SH'
exec setpriv --reuid=postgres --regid=postgres --clear-groups /usr/lib/postgresql/15/bin/postgres -D /srv/data -p "$PORT" -k /tmp
SH
  layer "database"
  ;;
ml)
  install python3 python3-pip ca-certificates libgomp1
  layer "python"
  # As the host trusts, and asks whom it asks: what it has for that leaves no trace in the image.
  pip() {
    cp /etc/pip.conf "$root/etc/pip.conf" 2>/dev/null || true
    cp /etc/ssl/certs/ca-certificates.crt "$root/tmp/ca.crt"
    inside env PIP_CERT=/tmp/ca.crt REQUESTS_CA_BUNDLE=/tmp/ca.crt python3 -m pip install -q --no-cache-dir --break-system-packages "$@"
    rm -f "$root/etc/pip.conf" "$root/tmp/ca.crt"
  }
  pip numpy scipy
  layer "numpy, scipy"
  pip pandas pyarrow
  layer "pandas"
  pip scikit-learn matplotlib statsmodels
  layer "scikit-learn"
  pip polars numba lightgbm
  layer "further packages"
  cat >"$root/srv/train.py" <<'PY'
import numpy, pandas
from sklearn.linear_model import LinearRegression
frame = pandas.DataFrame({"x": numpy.arange(100.0), "y": numpy.arange(100.0) * 3 + 1})
model = LinearRegression().fit(frame[["x"]], frame["y"])
print(f"import done, slope {model.coef_[0]:.3f}", flush=True)
PY
  start <<'SH'
exec python3 /srv/train.py
SH
  layer "application"
  ;;
*)
  echo "bench-image: unknown image $name" >&2
  exit 2
  ;;
esac
if [ "$name" != debian ]; then
  quietly umoci config --image "$layout:latest" --config.cmd /srv/start \
    --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --config.env PORT=8080
fi
quietly umoci gc --layout "$layout"
touch "$layout/.complete"
say "$(du -sm "$layout" | cut -f1) MB"
