// SPDX-License-Identifier: Apache-2.0
use proptest::prelude::*;

use super::*;
use crate::extent::WindowsSpace;
use crate::gzip::LeadingBits;

fn chunk(device_bytes: u32, start: u64, end: u64, codec: Codec, skip_bytes: u32) -> PlacedChunk {
    PlacedChunk {
        device_bytes,
        blob: Extent::new(start, end).unwrap(),
        codec,
        skip_bytes,
        crc32: 5,
        padding_bytes: 0,
        digest: ChunkDigest([4; 32]),
    }
}

fn window(start: u64, end: u64, bytes: u32) -> Option<WindowPin> {
    let extent: Extent<WindowsSpace> = Extent::new(start, end).unwrap();
    let digest = [6; 32];
    Some(WindowPin {
        extent,
        bytes,
        digest,
    })
}

fn block(frame_start: u64, bits: (u8, u8), window: Option<WindowPin>) -> Restart {
    let bits = LeadingBits::new(bits.0, bits.1).unwrap();
    Restart {
        frame_start,
        state: RestartState::Block { bits, window },
    }
}

fn member(frame_start: u64) -> Restart {
    Restart {
        frame_start,
        state: RestartState::Member,
    }
}

/// Three frames of gzip, the second of which two chunks share; and their points.
fn good() -> (Vec<PlacedChunk>, Vec<Restart>) {
    let deflate = |device, start, end, skip| chunk(device, start, end, Codec::Deflate, skip);
    (
        vec![
            deflate(1000, 0, 100, 0),
            deflate(1 << 20, 100, 5000, 0),
            deflate(500, 100, 5000, 1 << 20),
            deflate(70, 5010, 5020, 0),
        ],
        vec![
            member(0),
            block(100, (3, 5), window(16, 40, 32_768)),
            block(5010, (0, 0), None),
        ],
    )
}

const WINDOWS_BYTES: u64 = 40;

fn write(chunks: &[PlacedChunk]) -> Vec<u8> {
    write_unmodified(StrongAlgorithm::Blake3, chunks, 6000, DeviceForm::Tar).unwrap()
}

fn parse(chunks: &[PlacedChunk], restarts: &[Restart]) -> Result<ChunkMap, ChunkMapError> {
    ChunkMap::parse_unmodified(write(chunks), &write_restarts(restarts), WINDOWS_BYTES)
}

#[test]
fn gzip_chunks_and_their_points_read_back() {
    let (chunks, restarts) = good();
    let map = parse(&chunks, &restarts).unwrap();
    assert_eq!((map.count(), map.restart_count()), (4, 3));
    assert_eq!(map.access(), Access::Random);
    let points: Vec<Restart> = map
        .chunks()
        .flatten()
        .map(|chunk| map.restart(&chunk).unwrap())
        .collect();
    assert_eq!(points, [restarts[0], restarts[1], restarts[1], restarts[2]]);
    assert_eq!(map.chunk(2).unwrap().skip_bytes, 1 << 20);
    assert_eq!(map.stream_start(2), None);
    // Those who expect a map of Sluice's own blobs do not get this one.
    assert!(matches!(
        ChunkMap::parse(write(&chunks)),
        Err(ChunkMapError::Codec {
            ordinal: 0,
            code: 3
        })
    ));
}

#[test]
fn frames_of_unmodified_blobs_keep_their_rules() {
    use ChunkMapError as E;
    let refused = |chunks: &[PlacedChunk]| {
        write_unmodified(StrongAlgorithm::Blake3, chunks, 6000, DeviceForm::Tar).unwrap_err()
    };
    let plain = |device, start, end, codec| chunk(device, start, end, codec, 0);
    for codec in [Codec::ZstdFrames, Codec::Deflate, Codec::Raw, Codec::Zstd] {
        // Over the frame before; beyond the frames' end; empty.
        let first = plain(10, 10, 20, codec);
        assert!(matches!(
            refused(&[first, plain(10, 19, 29, codec)]),
            E::Frame { ordinal: 1, .. }
        ));
        assert!(matches!(
            refused(&[plain(10, 5995, 6005, codec)]),
            E::Frame { .. }
        ));
        assert!(matches!(
            refused(&[plain(10, 10, 10, codec)]),
            E::Frame { .. }
        ));
    }
    assert!(matches!(
        refused(&[plain(10, 10, 21, Codec::Raw)]),
        E::Frame { .. }
    ));
    let frame_max = 8 << 20;
    let long = [plain(10, 0, frame_max + 1, Codec::ZstdFrames)];
    let result = write_unmodified(
        StrongAlgorithm::Blake3,
        &long,
        frame_max * 2,
        DeviceForm::Tar,
    );
    assert!(matches!(result, Err(E::Frame { .. })));
    // Shared frames: the skip is what the chunks before gave, and both name the same frame.
    let shared =
        |skip, codec, end| refused(&[plain(1000, 0, 100, codec), chunk(1000, 0, end, codec, skip)]);
    for (skip, codec, end) in [
        (999, Codec::ZstdFrames, 100),
        (1001, Codec::Deflate, 100),
        (1000, Codec::Deflate, 101),
        (1000, Codec::Raw, 1000),
        (1000, Codec::Zstd, 100),
        (1000, Codec::ZstdStream, 100),
    ] {
        let error = shared(skip, codec, end);
        assert!(
            matches!(error, E::Skip { .. } | E::Frame { .. }),
            "{codec:?}: {error}"
        );
    }
    assert!(matches!(
        refused(&[chunk(10, 0, 10, Codec::Deflate, 1)]),
        E::Skip { ordinal: 0, .. }
    ));
    let mut long: Vec<PlacedChunk> = (0..17)
        .map(|at| chunk(1 << 20, 0, 100, Codec::Deflate, at << 20))
        .collect();
    assert!(matches!(refused(&long), E::Skip { ordinal: 16, .. }));
    long.pop();
    write(&long);
    // Long zstd frames: a part continues the part before, without a gap.
    let stream = [
        plain(10, 0, 50, Codec::ZstdStream),
        plain(10, 50, 50, Codec::ZstdNext),
        plain(10, 50, 90, Codec::ZstdNext),
        plain(10, 95, 99, Codec::ZstdStream),
    ];
    let map = parse(&stream, &[]).unwrap();
    assert_eq!(map.access(), Access::Prefix);
    let starts: Vec<u32> = (0..4)
        .map(|at| map.stream_start(at).unwrap().ordinal)
        .collect();
    assert_eq!(starts, [0, 0, 0, 3]);
    let gap = [stream[0], plain(10, 51, 60, Codec::ZstdNext)];
    assert!(matches!(refused(&gap), E::Frame { ordinal: 1, .. }));
    let alone = [plain(10, 0, 5, Codec::ZstdNext)];
    assert!(matches!(refused(&alone), E::Skip { ordinal: 0, .. }));
    let after = [
        plain(10, 0, 5, Codec::ZstdFrames),
        plain(10, 5, 9, Codec::ZstdNext),
    ];
    assert!(matches!(refused(&after), E::Skip { ordinal: 1, .. }));
}

#[test]
fn points_must_be_those_of_the_frames() {
    use ChunkMapError as E;
    let (chunks, restarts) = good();
    let with = |at: usize, restart: Restart| {
        let mut restarts = restarts.clone();
        restarts[at] = restart;
        match parse(&chunks, &restarts) {
            Err(E::Restart { ordinal, what }) => {
                assert_eq!(usize::try_from(ordinal).unwrap(), at);
                what
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(with(0, member(1)), "not where its frame begins");
    assert_eq!(with(0, block(0, (0, 0), None)), "nothing before it");
    let overlaps = "window overlaps another or leaves the file";
    for pin in [window(15, 40, 9), window(16, 41, 9), window(40, 41, 9)] {
        assert_eq!(with(1, block(100, (0, 0), pin)), overlaps);
    }
    assert_eq!(with(2, block(5010, (0, 0), window(39, 40, 9))), overlaps);
    for bytes in [0, 32_769] {
        let what = with(1, block(100, (0, 0), window(16, 40, bytes)));
        assert_eq!(what, "window is empty or too long");
    }
    assert_eq!(
        with(1, block(100, (0, 0), window(16, 16, 9))),
        "payload of its window is empty or too long"
    );
    let long = window(16, 16 + 33 * 1024 + 1, 9);
    assert_eq!(
        with(1, block(100, (0, 0), long)),
        "payload of its window is empty or too long"
    );
    for (fewer, actual) in [(&restarts[..2], 2), (&[][..], 0)] {
        assert_eq!(
            parse(&chunks, fewer).unwrap_err(),
            E::Restarts {
                expected: 3,
                actual
            }
        );
    }
    // Bytes that no writer makes.
    let raw = |at: usize, byte: u8| {
        let mut table = write_restarts(&restarts);
        table[64 + at] = byte;
        match ChunkMap::parse_unmodified(write(&chunks), &table, WINDOWS_BYTES) {
            Err(E::Restart { ordinal: 1, what }) => what,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(raw(24, 3), "unknown kind");
    assert_eq!(raw(24, 1), "a member with a state");
    assert_eq!(raw(25, 8), "leading bits");
    assert_eq!(raw(26, 8), "leading bits");
    assert_eq!(raw(27, 1), "reserved byte set");
    let mut table = write_restarts(&restarts);
    table.push(0);
    assert!(matches!(
        ChunkMap::parse_unmodified(write(&chunks), &table, WINDOWS_BYTES),
        Err(E::Length { .. })
    ));
    table.truncate(2 * 64 + 24);
    assert!(ChunkMap::parse_unmodified(write(&chunks), &table, WINDOWS_BYTES).is_err());
}

/// A frame and the chunks that share it: codec, gap before it, its bytes, sizes of its chunks.
type FrameShape = (Codec, u64, u32, Vec<u32>);

fn frame_shape() -> impl Strategy<Value = FrameShape> {
    let codec = prop::sample::select(vec![
        Codec::Zstd,
        Codec::ZstdFrames,
        Codec::Deflate,
        Codec::Raw,
        Codec::ZstdStream,
    ]);
    let sizes = prop::collection::vec(1u32..2000, 1..5);
    (codec, 0u64..50, 1u32..3000, sizes)
}

proptest! {
    /// Whatever is written reads back, every field of it.
    #[test]
    fn maps_and_points_round_trip(
        shapes in prop::collection::vec(frame_shape(), 0..20),
        bits in 0u8..8,
        windows in prop::collection::vec(prop::option::of((0u64..30, 1u64..2000, 1u32..32_769)), 20),
    ) {
        let (mut chunks, mut restarts) = (Vec::new(), Vec::new());
        // The first byte of a blob has nothing before it to restart from.
        let (mut at, mut windows_end) = (1, 16);
        for ((codec, gap, bytes, sizes), pin) in shapes.iter().zip(&windows) {
            at += gap;
            if *codec == Codec::Deflate {
                let value = u8::try_from((1u32 << bits) - 1).unwrap();
                let window = pin.and_then(|(gap, payload, bytes)| {
                    let start = windows_end + gap;
                    windows_end = start + payload;
                    window(start, windows_end, bytes)
                });
                let cases = [member(at), block(at, (bits, value), window)];
                restarts.push(cases[usize::from(pin.is_some())]);
            }
            let mut skip = 0;
            let end = at + u64::from(*bytes);
            for (ordinal, size) in sizes.iter().enumerate() {
                let (codec, extent) = match codec {
                    Codec::ZstdStream if ordinal > 0 => (Codec::ZstdNext, (end, end)),
                    Codec::Raw => (Codec::Raw, (at, at + u64::from(*size))),
                    codec => (*codec, (at, end)),
                };
                let shares = matches!(codec, Codec::ZstdFrames | Codec::Deflate);
                chunks.push(chunk(*size, extent.0, extent.1, codec, if shares { skip } else { 0 }));
                skip += size;
                at = extent.1;
                match codec {
                    Codec::Zstd => break,
                    Codec::Raw | Codec::ZstdStream | Codec::ZstdNext => {}
                    _ => at = extent.0,
                }
            }
            at = chunks.last().unwrap().blob.end();
        }
        let section = write_unmodified(StrongAlgorithm::Sha256, &chunks, at + 7, DeviceForm::Tar).unwrap();
        let map = ChunkMap::parse_unmodified(section, &write_restarts(&restarts), windows_end).unwrap();
        let mut device = 0;
        let mut points = Vec::new();
        prop_assert_eq!(u64::from(map.count()), chunks.len() as u64);
        for (read, written) in map.chunks().flatten().zip(&chunks) {
            prop_assert_eq!(read.device.start(), device);
            prop_assert_eq!(read.device.len(), u64::from(written.device_bytes));
            prop_assert_eq!((read.blob, read.codec, read.skip_bytes), (written.blob, written.codec, written.skip_bytes));
            prop_assert_eq!((read.crc32, read.digest), (Some(written.crc32), written.digest));
            device = read.device.end();
            let point = map.restart(&read);
            prop_assert_eq!(point.is_some(), read.codec == Codec::Deflate);
            points.extend(point.filter(|_| read.skip_bytes == 0));
        }
        prop_assert_eq!(points, restarts);
        prop_assert_eq!(map.frames_bytes(), at + 7);
    }
}
