module sluice.invalid/toccheck

go 1.26.8

require (
	github.com/containerd/stargz-snapshotter/estargz v0.16.3
	github.com/klauspost/compress v1.18.5
	github.com/opencontainers/go-digest v1.0.0
	github.com/vbatts/tar-split v0.12.3
)

require golang.org/x/sync v0.9.0 // indirect
