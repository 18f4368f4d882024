// SPDX-License-Identifier: Apache-2.0

// Command stargz-peer is stargz-snapshotter for a benchmark, over its library, because its own program is a module that
// no proxy serves.
//
//	stargz-peer serve ROOT SOCKET [record]
//	stargz-peer convert ADDRESS NAMESPACE SOURCE DESTINATION [RECORD]
//
// serve has the defaults of its own program; with record it logs each file at its first access. convert makes an image
// of containerd an eStargz image, with the files of RECORD first: "LAYER PATH" on a line each, in order.
package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	estargzconvert "github.com/containerd/stargz-snapshotter/nativeconverter/estargz"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
)

func main() {
	err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "stargz-peer:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	switch {
	case len(arguments) >= 3 && arguments[0] == "serve":
		return serve(arguments[1], arguments[2], len(arguments) > 3)
	case len(arguments) >= 5 && arguments[0] == "convert":
		return convert(arguments[1], arguments[2], arguments[3], arguments[4], arguments[5:])
	}
	return fmt.Errorf("usage: serve ROOT SOCKET [record] | convert ADDRESS NAMESPACE SOURCE DESTINATION [RECORD]")
}

func serve(root, socket string, record bool) error {
	ctx := context.Background()
	config := service.Config{}
	config.LogFileAccess = record
	config.NoPrometheus = true
	if record {
		if err := log.SetLevel("debug"); err != nil {
			return err
		}
		if err := log.SetFormat(log.JSONFormat); err != nil {
			return err
		}
	}
	snapshotter, err := service.NewStargzSnapshotterService(ctx, root, &config)
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-ends
		server.Stop()
	}()
	if err := server.Serve(listener); err != nil {
		return err
	}
	return snapshotter.Close()
}

func convert(address, namespace, source, destination string, record []string) error {
	ctx := namespaces.WithNamespace(context.Background(), namespace)
	containerd, err := client.New(address)
	if err != nil {
		return err
	}
	defer containerd.Close()
	ctx, done, err := containerd.WithLease(ctx)
	if err != nil {
		return err
	}
	defer done(ctx)
	first := map[digest.Digest][]estargz.Option{}
	if len(record) > 0 {
		if first, err = prioritized(ctx, containerd, source, record[0]); err != nil {
			return err
		}
	}
	layers := estargzconvert.LayerConvertWithLayerAndCommonOptsFunc(first, estargz.WithCompressionLevel(9))
	_, err = converter.Convert(ctx, containerd, destination, source,
		converter.WithDockerToOCI(true), converter.WithPlatform(platforms.Default()), converter.WithLayerConvertFunc(layers))
	return err
}

// prioritized reads which files of which layer go first.
func prioritized(ctx context.Context, containerd *client.Client, source, path string) (map[digest.Digest][]estargz.Option, error) {
	image, err := containerd.ImageService().Get(ctx, source)
	if err != nil {
		return nil, err
	}
	manifest, err := images.Manifest(ctx, containerd.ContentStore(), image.Target, platforms.Default())
	if err != nil {
		return nil, err
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	names := map[digest.Digest][]string{}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		number, name, found := strings.Cut(lines.Text(), " ")
		layer, err := strconv.Atoi(number)
		if !found || err != nil || layer < 0 || layer >= len(manifest.Layers) {
			return nil, fmt.Errorf("%s: not a layer and a path: %q", path, lines.Text())
		}
		blob := manifest.Layers[layer].Digest
		names[blob] = append(names[blob], name)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	options := map[digest.Digest][]estargz.Option{}
	for _, layer := range manifest.Layers {
		var missed []string
		// Without a list a layer says that nothing of it is wanted first, as the optimizer of the project does.
		options[layer.Digest] = []estargz.Option{
			estargz.WithPrioritizedFiles(names[layer.Digest]),
			estargz.WithAllowPrioritizeNotFound(&missed),
		}
	}
	return options, nil
}
