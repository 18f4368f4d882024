// SPDX-License-Identifier: Apache-2.0
//! Boot lists: the documented examples, every refusal, and that each list has one spelling.

use proptest::prelude::*;

use super::*;

fn index(name: &str) -> IndexDigest {
    IndexDigest::of(name.as_bytes())
}

fn at(layer: u16, chunk: u32) -> BootChunk {
    BootChunk { layer, chunk }
}

/// The list of docs/formats/boot-list.md.
fn example() -> BootList {
    let chunks = vec![at(1, 7), at(1, 8), at(0, 300), at(0, 299), at(1, 2)];
    BootList::new(vec![index("low"), index("high")], chunks).unwrap()
}

/// The examples of the document, by the line that stands before each.
fn documented(heading: &str) -> Vec<u8> {
    let text = include_str!("../../../docs/formats/boot-list.md");
    let after = text.split_once(heading).expect(heading).1;
    let lines = after.lines().skip_while(|line| !line.starts_with("    "));
    let digits: String = lines
        .take_while(|line| line.starts_with("    "))
        .flat_map(|line| line.split_whitespace())
        .collect();
    hex::decode(digits).unwrap()
}

#[test]
fn the_documented_examples_are_what_we_write() {
    let list = example();
    assert_eq!(
        hex::encode(list.encode()),
        hex::encode(documented("The list above, whole:"))
    );
    assert_eq!(BootList::decode(&list.encode()), Ok(list.clone()));
    let part = list.part(1).unwrap();
    assert_eq!(
        hex::encode(part.encode()),
        hex::encode(documented("Its part of the layer `high`:"))
    );
    assert_eq!(BootPart::decode(&part.encode()), Ok(part));
    let key = "The key of its run:";
    assert_eq!(list.key().as_bytes().as_slice(), documented(key));
}

#[test]
fn parts_make_up_the_list_again() {
    let list = example();
    let parts: Vec<BootPart> = [0, 1]
        .into_iter()
        .filter_map(|layer| list.part(layer))
        .collect();
    let again = BootList::of_parts(list.layers().to_vec(), &parts);
    assert_eq!(again, Ok(list.clone()));
    assert_eq!(list.part(2), None);
    // A part of another index has no say.
    let other = BootList::new(vec![index("other")], vec![at(0, 1)]).unwrap();
    let parts = [other.part(0).unwrap(), list.part(0).unwrap()];
    let again = BootList::of_parts(list.layers().to_vec(), &parts).unwrap();
    assert_eq!(again.chunks(), [at(0, 300), at(0, 299)]);
}

#[test]
fn what_does_not_fit_an_annotation_is_cut_off_at_the_end() {
    let chunks: Vec<BootChunk> = (0..5000).map(|n| at(0, (n * 7919) % 100_003)).collect();
    let part = BootList::new(vec![index("a")], chunks)
        .unwrap()
        .part(0)
        .unwrap();
    let mut before = 0;
    for most in 1..=3 {
        let (texts, count) = part.to_texts(most, 4000);
        assert_eq!(texts.len(), most);
        for text in &texts {
            assert!(text.len() <= 4000 && text.len() > 3990, "{}", text.len());
        }
        assert!(count > before + 900, "{before} {count}");
        let read = BootPart::from_texts(&texts).unwrap();
        assert_eq!(read.chunks(), &part.chunks()[..count]);
        before = count;
    }
    assert_eq!(part.to_texts(8, 40), (Vec::new(), 0));
    let (texts, count) = part.to_texts(8, 4000);
    assert_eq!(count, 5000);
    assert_eq!(BootPart::from_texts(&texts), Ok(part.clone()));
    let (texts, count) = part.to_texts(1, usize::MAX);
    assert_eq!((texts.len(), count), (1, 5000));
}

#[test]
fn texts_that_do_not_follow_each_other_are_refused() {
    let part = |name: &str, chunks: &[u32]| {
        let chunks = chunks.iter().map(|chunk| at(0, *chunk)).collect();
        let list = BootList::new(vec![index(name)], chunks).unwrap();
        list.part(0).unwrap()
    };
    let texts = |part: &BootPart| part.to_texts(8, 56).0;
    let whole = texts(&part("a", &(0..20).map(|n| n * 1000).collect::<Vec<_>>()));
    assert!(whole.len() > 2, "{whole:?}");
    let swapped = [whole[1].clone(), whole[0].clone()];
    assert_eq!(BootPart::from_texts(&swapped), Err(BootListError::Divided));
    let twice = [whole[0].clone(), whole[0].clone()];
    assert!(matches!(
        BootPart::from_texts(&twice),
        Err(BootListError::Twice { .. })
    ));
    let other = part("b", &(0..20).map(|n| 7 + n * 1000).collect::<Vec<_>>());
    let mixed = [whole[0].clone(), texts(&other)[1].clone()];
    assert_eq!(BootPart::from_texts(&mixed), Err(BootListError::Divided));
    let none: [&str; 0] = [];
    assert_eq!(BootPart::from_texts(&none), Err(BootListError::Text));
}

#[test]
fn keys_name_layers_and_their_order() {
    let key = |names: &[&str]| {
        let indexes: Vec<IndexDigest> = names.iter().map(|name| index(name)).collect();
        BootKey::of_layers(&indexes)
    };
    assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
    assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
    assert_ne!(key(&["a"]), key(&["a", "b"]));
    assert_eq!(key(&["a"]).to_string().len(), 64);
}

#[test]
fn regression_places_beyond_all_numbers_are_refused() {
    let mut bytes = vec![VERSION, FORM_PART];
    bytes.extend_from_slice(index("low").as_bytes());
    // One chunk, after the most that a number says.
    for number in [1, u64::MAX, 1, 0] {
        put_varint(&mut bytes, number);
    }
    let refused = BootPart::decode(&bytes).unwrap_err();
    let what = "places";
    let (count, max) = (u64::MAX, BOOT_CHUNKS_MAX);
    assert_eq!(refused, BootListError::TooMany { what, count, max });
}

#[test]
fn broken_lists_are_refused() {
    use BootListError as E;
    let whole = |tail: &[u8]| {
        let mut bytes = vec![1, 1, 1];
        bytes.extend_from_slice(index("a").as_bytes());
        bytes.extend_from_slice(tail);
        BootList::decode(&bytes).map(drop)
    };
    let many = |what, count, max| E::TooMany { what, count, max };
    let turn = "chunks of one layer in turn";
    let cases: &[(&[u8], Result<(), E>)] = &[
        (&[0], Ok(())),
        (&[2, 0, 2, 0, 0], Ok(())),
        (&[], Err(E::Cut)),
        (&[1, 0, 1], Err(E::Cut)),
        (&[0, 0], Err(E::Trailing)),
        (&[0x80, 0], Err(E::Number)),
        (&[1, 0, 1, 1], Err(E::Number)),
        (&[1, 0, 1, 0xff, 0xff, 0xff, 0xff, 0x7f], Err(E::Number)),
        (&[0xff; 11], Err(E::Number)),
        (
            &[0x81, 0x80, 1],
            Err(many("chunks", 16_385, BOOT_CHUNKS_MAX)),
        ),
        (&[1, 0, 2, 0, 0], Err(many(turn, 2, 1))),
        (&[1, 0, 0], Err(E::Divided)),
        (&[2, 0, 1, 0, 0, 1, 0], Err(E::Divided)),
        (&[2, 0, 2, 0, 1], Err(E::Twice { layer: 0, chunk: 0 })),
        (
            &[1, 1, 1, 0],
            Err(E::NoSuchLayer {
                layer: 1,
                layers: 1,
            }),
        ),
    ];
    for (tail, expected) in cases {
        assert_eq!(&whole(tail), expected, "{tail:?}");
    }
    for (bytes, version, form) in [([2, 1], 2, 1), ([1, 2], 1, 2), ([0, 0], 0, 0)] {
        assert_eq!(BootList::decode(&bytes), Err(E::Form { version, form }));
    }
    assert!(matches!(
        BootList::decode(&[1, 1, 0x81, 4]),
        Err(E::TooMany { count: 513, .. })
    ));
    let part = |tail: &[u8]| {
        let mut bytes = vec![1, 2];
        bytes.extend_from_slice(index("a").as_bytes());
        bytes.extend_from_slice(tail);
        BootPart::decode(&bytes).map(drop)
    };
    let cases: &[(&[u8], Result<(), E>)] = &[
        (&[2, 3, 1, 0, 1, 1, 0], Ok(())),
        (&[2, 0, 1, 0, 0, 1, 0], Err(E::Divided)),
        (&[2, 0, 2, 0, 1], Err(E::Twice { layer: 0, chunk: 0 })),
        (
            &[1, 0x80, 0x80, 1, 1, 0],
            Err(many("places", 16_385, BOOT_CHUNKS_MAX)),
        ),
        (&[1, 0, 1, 0, 9], Err(E::Trailing)),
    ];
    for (tail, expected) in cases {
        assert_eq!(&part(tail), expected, "{tail:?}");
    }
    for text in ["", "AQI", "*", "AQIA"] {
        assert!(BootPart::from_texts(&[text]).is_err(), "{text}");
    }
    assert!(BootList::new(Vec::new(), vec![at(0, 0)]).is_err());
}

proptest! {
    #[test]
    fn lists_and_parts_survive_their_bytes(
        layers in 1_u16..6,
        wanted in prop::collection::vec((0_u16..6, prop_oneof![0_u32..300, any::<u32>()]), 0..200),
    ) {
        let indexes: Vec<IndexDigest> = (0..layers).map(|n| index(&n.to_string())).collect();
        let mut chunks: Vec<BootChunk> = Vec::new();
        for (layer, chunk) in wanted {
            let chunk = at(layer % layers, chunk);
            if !chunks.contains(&chunk) {
                chunks.push(chunk);
            }
        }
        let list = BootList::new(indexes.clone(), chunks).unwrap();
        prop_assert_eq!(BootList::decode(&list.encode()).unwrap(), list.clone());
        let parts: Vec<BootPart> = (0..layers).filter_map(|layer| list.part(layer)).collect();
        for part in &parts {
            for max_bytes in [60, 100, usize::MAX] {
                let (texts, count) = part.to_texts(usize::MAX, max_bytes);
                prop_assert_eq!(count, part.chunks().len());
                prop_assert_eq!(&BootPart::from_texts(&texts).unwrap(), part);
            }
        }
        prop_assert_eq!(BootList::of_parts(indexes, &parts).unwrap(), list);
    }

    /// Whatever decodes has no other spelling.
    #[test]
    fn bytes_that_decode_are_what_would_be_written(tail in prop::collection::vec(0_u8..6, 0..40)) {
        let digest = index("a");
        let two = [&[1_u8, 1, 2][..], digest.as_bytes(), digest.as_bytes(), &tail].concat();
        if let Ok(list) = BootList::decode(&two) {
            prop_assert_eq!(list.encode(), two);
        }
        let part = [&[1_u8, 2][..], digest.as_bytes(), &tail].concat();
        if let Ok(read) = BootPart::decode(&part) {
            prop_assert_eq!(read.encode(), part);
        }
    }
}
