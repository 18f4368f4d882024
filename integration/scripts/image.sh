#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the demo image: Debian + Python + numerical packages + a small application, five layers,
# as an OCI layout. Usage: image.sh LAYOUT_DIR. Keeps what is there; needs root, debootstrap, umoci.
set -euo pipefail
layout=${1:?usage: image.sh LAYOUT_DIR}
[ -e "$layout/.complete" ] && exit 0
work=$(mktemp -d "${TMPDIR:-/tmp}/sluice-image.XXXXXX")
cleanup() {
  for m in proc dev/null; do umount -q "$work/bundle/rootfs/$m" 2>/dev/null || true; done
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
rm -rf "$layout"
mkdir -p "$(dirname "$layout")"
root=$work/bundle/rootfs
say() { printf '   image: %s\n' "$*"; }
# Runs a command inside the image with no service started and nothing of the host visible.
inside() {
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  mount -t proc proc "$root/proc"
  DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$root" "$@" >>"$work/log" 2>&1 ||
    { tail -30 "$work/log" >&2; return 1; }
  umount "$root/proc"
  rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/log/apt "$root"/var/log/dpkg.log
}
layer() {
  umoci repack --refresh-bundle --image "$layout:latest" --history.created_by "$1" "$work/bundle" >>"$work/log" 2>&1
  say "layer: $1"
}
umoci init --layout "$layout"
umoci new --image "$layout:latest"
umoci unpack --image "$layout:latest" "$work/bundle" >>"$work/log" 2>&1
say "debootstrap (a minute or two)"
debootstrap --variant=minbase bookworm "$root" >>"$work/log" 2>&1 || { tail -30 "$work/log" >&2; exit 1; }
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
rm -rf "$root"/var/cache/apt/archives/*.deb
layer "debian minbase"
inside apt-get -q update
inside apt-get -q -y --no-install-recommends install python3 ca-certificates libcap2-bin
layer "python"
inside apt-get -q -y --no-install-recommends install python3-numpy python3-requests python3-flask python3-pandas
layer "python packages"
mkdir -p "$root/srv/app/data"
cat >"$root/srv/app/ready.py" <<'PY'
"""Starts as a real application does: imports its frameworks, computes once, says that it is ready."""
import json, sys, time
start = time.monotonic()
import numpy, flask, requests
app = flask.Flask("demo")
value = float(numpy.linalg.det(numpy.arange(9.0).reshape(3, 3) + numpy.eye(3)))
print(json.dumps({"ready": True, "det": round(value, 6), "import_seconds": round(time.monotonic() - start, 3)}), flush=True)
if "--serve" in sys.argv:
    time.sleep(3600)
PY
head -c 3000000 /dev/urandom >"$root/srv/app/data/model.bin"
ln "$root/srv/app/data/model.bin" "$root/srv/app/data/model.link"
ln -s ../app/ready.py "$root/srv/app/start"
setcap cap_net_bind_service+ep "$root/usr/bin/python3.11"
layer "application"
rm -rf "$root/usr/share/doc/python3-numpy" "$root/var/lib/apt/lists"
mkdir -p "$root/var/lib/apt/lists"
echo "demo" >"$root/etc/demo-release"
layer "trim"
umoci config --image "$layout:latest" --config.cmd /usr/bin/python3 --config.cmd /srv/app/ready.py \
  --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --config.workingdir /srv/app
umoci gc --layout "$layout" >>"$work/log" 2>&1
touch "$layout/.complete"
say "$(du -sm "$layout" | cut -f1) MB in $layout"
