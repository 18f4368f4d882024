// SPDX-License-Identifier: Apache-2.0

// Command toccheck reads the eStargz and zstd:chunked layers of an OCI layout with the code of others: stargz-snapshotter's
// estargz package and tar-split. It verifies the table of contents, each chunk and each file, and that the blob, and of
// zstd:chunked also its kept headers with the files, give a tar of the diff ID.
package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/archive/tar"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

const (
	checksum = "io.github.containers.zstd-chunked.manifest-checksum"
	position = "io.github.containers.zstd-chunked.manifest-position"
	headers  = "io.github.containers.zstd-chunked.tarsplit-position"
)

type descriptor struct {
	Digest      digest.Digest     `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations"`
}

// chunk is what readers of zstd:chunked know of a chunk that estargz's own type does not say.
type chunk struct {
	estargz.TOCEntry
	EndOffset int64 `json:"endOffset"`
}

type layout string

func (l layout) path(d digest.Digest) string {
	return filepath.Join(string(l), "blobs", d.Algorithm().String(), d.Encoded())
}

func (l layout) read(d digest.Digest, into any) error {
	content, err := os.ReadFile(l.path(d))
	if err != nil {
		return err
	}
	return json.Unmarshal(content, into)
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: toccheck LAYOUT")
		os.Exit(2)
	}
	if err := run(layout(os.Args[1])); err != nil {
		fmt.Fprintln(os.Stderr, "toccheck:", err)
		os.Exit(1)
	}
}

func run(l layout) error {
	content, err := os.ReadFile(filepath.Join(string(l), "index.json"))
	if err != nil {
		return err
	}
	var index struct{ Manifests []descriptor }
	if err := json.Unmarshal(content, &index); err != nil {
		return err
	}
	if len(index.Manifests) == 0 {
		return errors.New("no image")
	}
	for _, image := range index.Manifests {
		var manifest struct {
			Config descriptor
			Layers []descriptor
		}
		if err := l.read(image.Digest, &manifest); err != nil {
			return err
		}
		var config struct {
			RootFS struct {
				DiffIDs []digest.Digest `json:"diff_ids"`
			} `json:"rootfs"`
		}
		if err := l.read(manifest.Config.Digest, &config); err != nil {
			return err
		}
		if len(manifest.Layers) != len(config.RootFS.DiffIDs) || len(manifest.Layers) == 0 {
			return fmt.Errorf("%d layers, %d diff IDs", len(manifest.Layers), len(config.RootFS.DiffIDs))
		}
		for i, layer := range manifest.Layers {
			if err := check(l.path(layer.Digest), layer, config.RootFS.DiffIDs[i]); err != nil {
				return fmt.Errorf("layer %s: %w", layer.Digest, err)
			}
		}
	}
	return nil
}

func check(path string, layer descriptor, diffID digest.Digest) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	blob := io.NewSectionReader(file, 0, layer.Size)
	toc, isStargz := layer.Annotations[estargz.TOCJSONDigestAnnotation]
	_, isZstd := layer.Annotations[checksum]
	switch {
	case isStargz == isZstd:
		return fmt.Errorf("annotations %v", layer.Annotations)
	case isStargz:
		return checkStargz(blob, digest.Digest(toc), layer.Annotations[estargz.StoreUncompressedSizeAnnotation], diffID)
	default:
		return checkZstd(blob, layer.Annotations, diffID)
	}
}

func sameDiff(tar io.Reader, diffID digest.Digest) (int64, error) {
	verifier := diffID.Verifier()
	n, err := io.Copy(verifier, tar)
	if err != nil {
		return n, err
	}
	if !verifier.Verified() {
		return n, fmt.Errorf("another diff ID than %s", diffID)
	}
	return n, nil
}

func checkStargz(blob *io.SectionReader, tocDigest digest.Digest, size string, diffID digest.Digest) error {
	whole, err := gzip.NewReader(blob)
	if err != nil {
		return err
	}
	n, err := sameDiff(whole, diffID)
	if err != nil {
		return err
	}
	if fmt.Sprint(n) != size {
		return fmt.Errorf("tar of %d bytes, annotated are %s", n, size)
	}
	reader, err := estargz.Open(io.NewSectionReader(blob, 0, blob.Size()))
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	verifiers, err := reader.VerifyTOC(tocDigest)
	if err != nil {
		return err
	}
	root, ok := reader.Lookup("")
	if !ok {
		return errors.New("no root")
	}
	files, chunks := 0, 0
	var walk func(path string, entry *estargz.TOCEntry) error
	walk = func(path string, entry *estargz.TOCEntry) (err error) {
		entry.ForeachChild(func(name string, child *estargz.TOCEntry) bool {
			err = walk(path+"/"+name, child)
			return err == nil
		})
		if err != nil || entry.Type != "reg" || entry.Size == 0 {
			return err
		}
		// A hard link has the name of what it links to.
		content, err := reader.OpenFile(entry.Name)
		if err != nil {
			return err
		}
		files++
		// A read begins at the chunk's first byte again, so it is read at once.
		whole := digest.Digest(entry.Digest).Verifier()
		for at := int64(0); at < entry.Size; {
			part, ok := reader.ChunkEntryForOffset(entry.Name, at)
			if !ok || part.ChunkOffset != at || part.ChunkSize <= 0 || part.ChunkSize > entry.Size-at {
				return fmt.Errorf("%s: no chunk at %d", path, at)
			}
			verifier, err := verifiers.Verifier(part)
			if err != nil {
				return err
			}
			bytes := make([]byte, part.ChunkSize)
			if _, err := content.ReadAt(bytes, at); err != nil && err != io.EOF {
				return fmt.Errorf("%s at %d: %w", path, at, err)
			}
			if _, err := io.MultiWriter(verifier, whole).Write(bytes); err != nil {
				return err
			}
			if !verifier.Verified() {
				return fmt.Errorf("%s: chunk at %d has another digest", path, at)
			}
			at += part.ChunkSize
			chunks++
		}
		if !whole.Verified() {
			return fmt.Errorf("%s: another digest", path)
		}
		return nil
	}
	if err := walk("", root); err != nil {
		return err
	}
	fmt.Printf("estargz: %d files in %d chunks\n", files, chunks)
	return nil
}

func section(blob *io.SectionReader, text string, numbers int) (*io.SectionReader, []int64, error) {
	place := make([]int64, numbers)
	for i, field := range strings.SplitN(text, ":", numbers) {
		if _, err := fmt.Sscan(field, &place[i]); err != nil {
			return nil, nil, fmt.Errorf("annotation %q: %w", text, err)
		}
	}
	return io.NewSectionReader(blob, place[0], place[1]), place, nil
}

// contents gives files by their names in the tar.
type contents struct {
	blob   *io.SectionReader
	chunks map[string][]chunk
}

func (c contents) Get(name string) (io.ReadCloser, error) {
	var file bytes.Buffer
	for _, part := range c.chunks[name] {
		content, err := decode(c.blob, part)
		if err != nil {
			return nil, fmt.Errorf("%s at %d: %w", name, part.ChunkOffset, err)
		}
		file.Write(content)
	}
	return io.NopCloser(&file), nil
}

// decode takes the bytes up to the end of the chunk's frame, and expects them to be the chunk and nothing more.
func decode(blob *io.SectionReader, part chunk) ([]byte, error) {
	decoder, err := zstd.NewReader(io.NewSectionReader(blob, part.Offset, part.EndOffset-part.Offset), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer decoder.Close()
	content, err := io.ReadAll(decoder)
	if err != nil {
		return nil, err
	}
	if int64(len(content)) != part.ChunkSize {
		return nil, fmt.Errorf("%d bytes instead of %d", len(content), part.ChunkSize)
	}
	if digest.FromBytes(content).String() != part.ChunkDigest {
		return nil, errors.New("another digest")
	}
	return content, nil
}

func checkZstd(blob *io.SectionReader, annotations map[string]string, diffID digest.Digest) error {
	whole, err := zstd.NewReader(io.NewSectionReader(blob, 0, blob.Size()))
	if err != nil {
		return err
	}
	defer whole.Close()
	if _, err := sameDiff(whole, diffID); err != nil {
		return err
	}
	toc, place, err := section(blob, annotations[position], 4)
	if err != nil {
		return err
	}
	if _, err := sameDiff(toc, digest.Digest(annotations[checksum])); err != nil {
		return err
	}
	if _, err := toc.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if _, _, err := new(zstdchunked.Decompressor).ParseTOC(toc); err != nil {
		return err
	}
	if _, err := toc.Seek(0, io.SeekStart); err != nil {
		return err
	}
	decoder, err := zstd.NewReader(toc)
	if err != nil {
		return err
	}
	defer decoder.Close()
	text, err := io.ReadAll(decoder)
	if err != nil {
		return err
	}
	if int64(len(text)) != place[2] || place[3] != 1 {
		return fmt.Errorf("table of contents of %d bytes, annotated is %v", len(text), place)
	}
	var listed struct {
		Entries        []chunk       `json:"entries"`
		TarSplitDigest digest.Digest `json:"tarSplitDigest"`
	}
	if err := json.Unmarshal(text, &listed); err != nil {
		return err
	}
	found := contents{blob: blob, chunks: map[string][]chunk{}}
	entries := map[string]estargz.TOCEntry{}
	for i, entry := range listed.Entries {
		if entry.Type != "chunk" {
			entries[entry.Name] = entry.TOCEntry
		}
		if entry.Type != "chunk" && (entry.Type != "reg" || entry.Size == 0) {
			continue
		}
		// A chunk's frame ends where the next one's begins, the last one's where the file's first entry says.
		if i+1 < len(listed.Entries) && listed.Entries[i+1].Type == "chunk" {
			if entry.Type == "reg" {
				listed.Entries[i+1].EndOffset = entry.EndOffset
			} else {
				listed.Entries[i+1].EndOffset = listed.Entries[i].EndOffset
			}
			entry.EndOffset = listed.Entries[i+1].Offset
		}
		if entry.ChunkSize == 0 {
			entry.ChunkSize = entry.Size
		}
		found.chunks[entry.Name] = append(found.chunks[entry.Name], entry)
	}
	lines, place, err := section(blob, annotations[headers], 3)
	if err != nil {
		return err
	}
	if _, err := sameDiff(lines, listed.TarSplitDigest); err != nil {
		return err
	}
	if _, err := lines.Seek(0, io.SeekStart); err != nil {
		return err
	}
	lineReader, err := zstd.NewReader(lines)
	if err != nil {
		return err
	}
	defer lineReader.Close()
	kept, err := io.ReadAll(lineReader)
	if err != nil {
		return err
	}
	if int64(len(kept)) != place[2] {
		return fmt.Errorf("headers of %d bytes, annotated is %v", len(kept), place)
	}
	count := 0
	err = asm.IterateHeaders(storage.NewJSONUnpacker(bytes.NewReader(kept)), func(header *tar.Header) error {
		count++
		entry, ok := entries[header.Name]
		if !ok {
			return fmt.Errorf("%s is not listed", header.Name)
		}
		same := entry.Mode == header.Mode && entry.Size == header.Size && entry.UID == header.Uid && entry.GID == header.Gid &&
			entry.LinkName == header.Linkname && int64(entry.DevMajor) == header.Devmajor && int64(entry.DevMinor) == header.Devminor
		if !same {
			return fmt.Errorf("%s: listed as %+v, the header is %+v", header.Name, entry, header)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if count != len(entries) {
		return fmt.Errorf("%d headers, %d entries", count, len(entries))
	}
	// This verifies the crc64 of every file as well.
	made := asm.NewOutputTarStream(found, storage.NewJSONUnpacker(bytes.NewReader(kept)))
	defer made.Close()
	if _, err := sameDiff(made, diffID); err != nil {
		return fmt.Errorf("made again: %w", err)
	}
	fmt.Printf("zstd-chunked: %d entries, %d files\n", count, len(found.chunks))
	return nil
}
