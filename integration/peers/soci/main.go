// SPDX-License-Identifier: Apache-2.0

// Command soci-peer is the SOCI snapshotter for a benchmark, over its library, because its own programs are a module
// that no proxy serves.
//
//	soci-peer serve ROOT SOCKET CONTAINERD
//	soci-peer convert STATE CONTAINERD NAMESPACE SOURCE DESTINATION
//
// serve has the defaults of its own program, with metadata in one database. convert makes an image of containerd one
// with an index of version 2 and pushes it.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/awslabs/soci-snapshotter/config"
	socifs "github.com/awslabs/soci-snapshotter/fs"
	"github.com/awslabs/soci-snapshotter/metadata"
	"github.com/awslabs/soci-snapshotter/service"
	"github.com/awslabs/soci-snapshotter/soci"
	"github.com/awslabs/soci-snapshotter/soci/store"
	"github.com/awslabs/soci-snapshotter/ztoc"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "soci-peer:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	switch {
	case len(arguments) == 4 && arguments[0] == "serve":
		return serve(arguments[1], arguments[2], arguments[3])
	case len(arguments) == 6 && arguments[0] == "convert":
		return convert(arguments[1], arguments[2], arguments[3], arguments[4], arguments[5])
	}
	return fmt.Errorf("usage: serve ROOT SOCKET CONTAINERD | convert STATE CONTAINERD NAMESPACE SOURCE DESTINATION")
}

func serve(root, socket, containerd string) error {
	settings := config.NewConfig()
	if settings == nil {
		return fmt.Errorf("no default configuration")
	}
	settings.NoPrometheus = true
	settings.ServiceConfig.NoPrometheus = true
	settings.ContentStoreConfig.Type = store.ContainerdContentStoreType
	settings.ContentStoreConfig.ContainerdAddress = containerd
	database, err := bolt.Open(filepath.Join(root, "metadata.db"), 0600, &bolt.Options{
		NoFreelistSync: true, InitialMmapSize: 64 * 1024 * 1024, FreelistType: bolt.FreelistMapType,
	})
	if err != nil {
		return err
	}
	defer database.Close()
	read := func(blob *io.SectionReader, toc ztoc.TOC, options ...metadata.Option) (metadata.Reader, error) {
		return metadata.NewReader(database, blob, toc, options...)
	}
	snapshotter, err := service.NewSociSnapshotterService(context.Background(), root, &settings.ServiceConfig,
		service.WithFilesystemOptions(socifs.WithMetadataStore(read)))
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(passNamespace))
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

// passNamespace has calls to containerd made in the namespace that it has called in.
func passNamespace(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if namespace, ok := namespaces.Namespace(ctx); ok {
		ctx = namespaces.WithNamespace(ctx, namespace)
	}
	return handle(ctx, request)
}

func convert(state, address, namespace, source, destination string) error {
	ctx := namespaces.WithNamespace(context.Background(), namespace)
	containerd, err := client.New(address)
	if err != nil {
		return err
	}
	defer containerd.Close()
	image, err := containerd.ImageService().Get(ctx, source)
	if err != nil {
		return err
	}
	blobs, err := store.NewContentStore(
		store.WithType(store.ContainerdContentStoreType), store.WithClient(store.NewContainerdClient(address)),
		store.WithContainerdAddress(address))
	if err != nil {
		return err
	}
	ctx, done, err := blobs.BatchOpen(ctx)
	if err != nil {
		return err
	}
	defer done(ctx)
	artifacts, err := soci.NewDB(soci.ArtifactsDbPath(state))
	if err != nil {
		return err
	}
	builder, err := soci.NewIndexBuilder(containerd.ContentStore(), blobs, soci.WithArtifactsDb(artifacts))
	if err != nil {
		return err
	}
	converted, err := builder.Convert(ctx, image)
	if err != nil {
		return err
	}
	plain := docker.WithPlainHTTP(docker.MatchLocalhost)
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(plain)})
	return containerd.Push(ctx, destination, *converted, client.WithResolver(resolver), client.WithPlatformMatcher(platforms.All))
}
