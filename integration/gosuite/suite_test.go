// SPDX-License-Identifier: Apache-2.0

// Package gosuite runs containerd's own snapshotter test suite against a running sluiced.
package gosuite

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// TestSluice needs SLUICE_SNAPSHOTS_SOCKET: the daemon's snapshots socket.
func TestSluice(t *testing.T) {
	socket := os.Getenv("SLUICE_SNAPSHOTS_SOCKET")
	if socket == "" {
		t.Fatal("SLUICE_SNAPSHOTS_SOCKET is not set")
	}
	// The suite goes by this name where kernels differ: renaming a directory of a lower layer needs
	// redirect_dir, which overlay mounts of containerd do not set either.
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "sluice")
		return snapshotter, connection.Close, nil
	})
}
