#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The inside of a machine that integration/src/harness/world.rs makes: the first process of namespaces of its own.
# Its root is this machine's, copied on write; its state, network and registries are its own. When it is made, it runs
# the steps that it was given, and ends.
#
# Usage: world.sh ROOT BUILT TOOLS CONTAINERD REGISTRY
#   ROOT        a directory on a disk: `machine/` with image/ (an OCI layout) and steps.sh, everything else is made here
#   BUILT       our built programs
#   TOOLS       what go-tools.sh built
#   CONTAINERD  1 (Debian's, as its package sets it up) or 2 (without a configuration)
#   REGISTRY    open      https://registry.example, which everybody may read; the machine trusts its certificate
#               private   the same, but only for dev with the password pa55:word
#               authority the same at port 5000, by a certificate of the authority in ~/ca.pem, which the machine does not trust
#               cached    open, with a pull-through cache at https://cache.example
set -euo pipefail
root=$1 built=$2 tools=$3 containerd=$4 registry=$5
say() { echo "world: $*" >&2; }

mount --make-rprivate /
mkdir -p "$root"/{upper,work,new,containerd,sluice,nerdctl,registry}
new=$root/new
mount -t overlay overlay -o "lowerdir=/,upperdir=$root/upper,workdir=$root/work" "$new"
mount -t proc proc "$new/proc"
for place in dev sys; do mount --rbind "/$place" "$new/$place"; done
for place in run tmp root; do mount -t tmpfs -o mode=1777 tmpfs "$new/$place"; done
chmod 755 "$new/run"; chmod 700 "$new/root"
# What is an upper directory of overlayfs cannot be on one.
for state in containerd sluice nerdctl; do
  mkdir -p "$new/var/lib/$state"
  mount --bind "$root/$state" "$new/var/lib/$state"
done
mkdir -p "$new/machine" "$new/machine.registry"
mount --bind "$root/machine" "$new/machine"
mount --bind "$root/registry" "$new/machine.registry"
mkdir -p "$new/old.root"
cd "$new"
pivot_root . old.root
umount -l /old.root
rmdir /old.root
cd /root
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset DOCKER_CONFIG XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_CONFIG_HOME SLUICE_CONTROL_SOCKET SLUICE_STATE

# As new: with programs, and nothing set up.
rm -rf /etc/{containerd,sluice,nerdctl,cni,docker,kubernetes,systemd} /usr/bin/sluice* /usr/lib/systemd/system/sluiced.service
rm -rf /var/log/* /var/lib/cni
ln -sf "$built/unit-control" /usr/local/bin/systemctl
ln -sf "$built/connect-proxy" /usr/local/bin/connect-proxy
ln -sf "$tools/crictl" /usr/local/bin/crictl
ln -sf "$tools/nerdctl$containerd" /usr/local/bin/nerdctl
if [ "$containerd" = 2 ]; then
  ln -sf "$tools/containerd2" /usr/bin/containerd
  ln -sf "$tools/ctr2" /usr/bin/ctr
  ln -sf "$tools/containerd-shim-runc-v2" /usr/bin/containerd-shim-runc-v2
else
  mkdir -p /etc/containerd
  printf '%s\n' 'version = 2' '' '[plugins]' '  [plugins."io.containerd.grpc.v1.cri"]' \
    '    [plugins."io.containerd.grpc.v1.cri".cni]' '      bin_dir = "/usr/lib/cni"' '      conf_dir = "/etc/cni/net.d"' \
    '  [plugins."io.containerd.internal.v1.opt"]' '    path = "/var/lib/containerd/opt"' >/etc/containerd/config.toml
fi

ip link set lo up
cat >/etc/hosts <<'HOSTS'
127.0.0.1 localhost registry.example sluice-seeds.example proxy.example
127.0.0.2 cache.example
HOSTS
certificates() {
  cd /machine.registry
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "/CN=an authority" \
    -keyout ca.key -out ca.pem
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=registry.example" -keyout key.pem -out request.pem
  openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out cert.pem \
    -extfile <(echo "subjectAltName=DNS:registry.example,DNS:cache.example")
  cd /root
}
certificates >/machine/certificates.log 2>&1
# serve NAME ADDRESS FURTHER: Debian's registry.
serve() {
  cat >"/machine.registry/$1.yml" <<CONFIG
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: /machine.registry/$1}, delete: {enabled: true}}
http: {addr: "$2", tls: {certificate: /machine.registry/cert.pem, key: /machine.registry/key.pem}}
$3
CONFIG
  OTEL_TRACES_EXPORTER=none docker-registry serve "/machine.registry/$1.yml" >"/machine/$1.log" 2>&1 </dev/null &
  for _ in {1..250}; do
    if (: <"/dev/tcp/${2%:*}/${2##*:}") 2>/dev/null; then return 0; fi
    sleep 0.04
  done
  say "the registry $1 does not answer"; return 1
}
host=registry.example:443 name=registry.example further='' credentials=()
case $registry in
open | cached) ;;
private)
  echo 'dev:$2y$05$abcdefghijklmnopqrstuuyJFE65A46/2eXN/SomAkqtHDi1XDOkC' >/machine.registry/htpasswd
  further='auth: {htpasswd: {realm: private, path: /machine.registry/htpasswd}}'
  credentials=(--dest-creds=dev:pa55:word) ;;
authority) host=registry.example:5000 name=registry.example:5000; cp /machine.registry/ca.pem /root/ca.pem ;;
*) say "no registry $registry"; exit 2 ;;
esac
[ "$registry" = authority ] || cat /machine.registry/ca.pem >>/etc/ssl/certs/ca-certificates.crt
serve registry "127.0.0.1:${host##*:}" "$further"
if [ "$registry" = cached ]; then
  serve cache 127.0.0.2:443 'proxy: {remoteurl: "https://registry.example"}'
fi
skopeo --insecure-policy copy --quiet --dest-tls-verify=false "${credentials[@]}" oci:/machine/image:latest "docker://$name/team/app:v1"
say "made: containerd $containerd, registry $registry"
exec bash /machine/steps.sh
