// SPDX-License-Identifier: Apache-2.0
//! Attaches learned boot lists to a converted image: an annotation on each layer that a list names.
//!
//! Only manifests change, and the indexes above them. Config, layers, diff IDs and all other annotations
//! stay as they are, so a node that has the image needs nothing but the new manifest. Deciding and
//! editing are pure; [`read_tree`] and [`write()`] talk to where the image is kept.

use std::sync::Arc;

use serde_json::{Map, Value};
use sluice_blockindex::annotations::{BOOT, BOOT_MAX_BYTES, LayerMark};
use sluice_blockindex::boot::{BootKey, BootList};
use sluice_blockindex::digest::{BlobDigest, IndexDigest};

use crate::image::{Descriptor, Document, DocumentKind, ImageError, ImageReader, ImageWriter};
use crate::plan::{finish_index, is_image};

/// Lazy layers of a manifest that lie directly upon each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Place of the lowest one among the manifest's layers.
    pub first: usize,
    /// Their indexes, lowest first.
    pub indexes: Vec<IndexDigest>,
}

impl Run {
    /// Names its boot list.
    #[must_use]
    pub fn key(&self) -> BootKey {
        BootKey::of_layers(&self.indexes)
    }
}

/// An image as it is now.
#[derive(Debug)]
pub struct Tree {
    /// What the name stands for.
    pub root: Document,
    /// The manifests of images in it: the root itself, or entries of the index that is the root.
    pub manifests: Vec<(Option<Descriptor>, Document)>,
}

/// How much of a list a layer got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attached {
    /// Place of the layer among the manifest's.
    pub layer: usize,
    /// Chunks of the list that are in this layer.
    pub listed: usize,
    /// Of these, those that fit into the annotations, the first ones.
    pub attached: usize,
}

/// Reads an image's documents.
///
/// **Errors**: it is not there, or not what it claims.
pub async fn read_tree(image: &dyn ImageReader) -> Result<Tree, ImageError> {
    let root = image.root().await?;
    if root.kind == DocumentKind::Manifest {
        let manifests = vec![(None, root.clone())];
        return Ok(Tree { root, manifests });
    }
    let mut manifests = Vec::new();
    for entry in root.list("manifests")? {
        let document = image.document(&entry).await?;
        if is_image(&document) {
            manifests.push((Some(entry), document));
        }
    }
    Ok(Tree { root, manifests })
}

/// The runs of lazy layers of a manifest, lowest first.
///
/// **Errors**: its layers cannot be read.
pub fn runs(manifest: &Document) -> Result<Vec<Run>, ImageError> {
    let mut runs: Vec<Run> = Vec::new();
    let mut open = false;
    for (number, layer) in manifest.list("layers")?.iter().enumerate() {
        let mark = LayerMark::parse(|name| layer.annotations.get(name).map(String::as_str));
        let Ok(LayerMark::Lazy(annotations)) = mark else {
            open = false;
            continue;
        };
        match runs.last_mut().filter(|_| open) {
            Some(run) => run.indexes.push(annotations.index_digest),
            None => runs.push(Run {
                first: number,
                indexes: vec![annotations.index_digest],
            }),
        }
        open = true;
    }
    Ok(runs)
}

/// The manifest with these lists attached, each to the layers of its run; what was attached to them
/// before goes. Lists of other layers than their run's are left out.
#[must_use]
pub fn annotate(manifest: &Document, lists: &[(Run, BootList)]) -> (Document, Vec<Attached>) {
    let mut value = manifest.value.clone();
    let mut attached = Vec::new();
    for (run, list) in lists.iter().filter(|(run, list)| run.key() == list.key()) {
        for (place, layer) in (0_u16..).zip(run.first..run.first + run.indexes.len()) {
            let part = list.part(place);
            let (texts, count) = part.as_ref().map_or_else(Default::default, |part| {
                part.to_texts(BOOT.len(), BOOT_MAX_BYTES)
            });
            let Some(descriptor) = value["layers"][layer].as_object_mut() else {
                continue;
            };
            if let Some(part) = part {
                attached.push(Attached {
                    layer,
                    listed: part.chunks().len(),
                    attached: count,
                });
            }
            set(descriptor, &texts);
        }
    }
    if value == manifest.value {
        // The very bytes that it had.
        return (manifest.clone(), attached);
    }
    (Document::of_value(&manifest.media_type, value), attached)
}

/// Sets the annotations of a layer, and takes away those for which there is no text.
fn set(descriptor: &mut Map<String, Value>, texts: &[String]) {
    let annotations = descriptor
        .entry("annotations")
        .or_insert_with(|| Value::Object(Map::new()));
    let Some(annotations) = annotations.as_object_mut() else {
        return;
    };
    for (at, name) in BOOT.into_iter().enumerate() {
        match texts.get(at) {
            Some(text) => {
                annotations.insert(name.to_owned(), text.as_str().into());
            }
            None => {
                // The order of the others stays.
                annotations.shift_remove(name);
            }
        }
    }
}

/// What a tree becomes when its manifests are replaced by `changed`, in their order: the root, and
/// what must be stored before it.
#[must_use]
pub fn replace(tree: &Tree, changed: Vec<Document>) -> (Document, Vec<Document>) {
    let mut changed: Vec<(Option<Descriptor>, Document)> = tree
        .manifests
        .iter()
        .zip(changed)
        .map(|((entry, _), document)| (entry.clone(), document))
        .collect();
    if let Some((None, root)) = changed.first() {
        return (root.clone(), Vec::new());
    }
    let entries = tree.root.list("manifests").unwrap_or_default();
    let children: Vec<(Descriptor, Descriptor)> = entries
        .into_iter()
        .map(|entry| {
            let new = changed.iter().find(|(old, _)| old.as_ref() == Some(&entry));
            let new = new.map_or_else(|| entry.clone(), |(_, document)| document.descriptor());
            (entry, new)
        })
        .collect();
    let root = finish_index(&tree.root, &children);
    let same = |(old, new): &(Option<Descriptor>, Document)| {
        old.as_ref().is_some_and(|old| old.digest == new.digest)
    };
    changed.retain(|pair| !same(pair));
    let documents = changed.into_iter().map(|(_, document)| document);
    (root, documents.collect())
}

/// Stores the new documents, and names the root last.
///
/// **Errors**: the place refuses them; the name then stands for what it did.
pub async fn write(
    destination: &Arc<dyn ImageWriter>,
    root: &Document,
    documents: &[Document],
) -> Result<BlobDigest, ImageError> {
    for document in documents {
        destination.put_document(document).await?;
    }
    destination.name(root).await?;
    Ok(root.digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use sluice_blockindex::annotations::LayerAnnotations;
    use sluice_blockindex::boot::{BootChunk, BootPart};
    use sluice_blockindex::digest::{ConfigDigest, DiffId};
    use sluice_blockindex::extent::Extent;

    use crate::image::document::{OCI_CONFIG, OCI_INDEX, OCI_LAYER_ZSTD, OCI_MANIFEST};
    use crate::image::memory::MemoryImage;

    fn index(name: &str) -> IndexDigest {
        IndexDigest::of(name.as_bytes())
    }

    /// A layer with an index of this name; none for an empty one.
    fn layer(name: &str) -> Value {
        let blob = BlobDigest::of(name.as_bytes());
        let mut layer =
            json!({"mediaType": OCI_LAYER_ZSTD, "digest": blob.to_string(), "size": 100});
        if !name.is_empty() {
            let annotations = LayerAnnotations {
                index_extent: Extent::new(10, 20).unwrap(),
                index_digest: index(name),
                blob,
                blob_bytes: 100,
                diff_id: DiffId::of(name.as_bytes()),
                config: ConfigDigest::of(b"config"),
                port: None,
                boot: Vec::new(),
            };
            let mut map = annotations.to_map();
            map.insert("zz.other".to_owned(), "stays".to_owned());
            layer["annotations"] = json!(map);
        }
        layer
    }

    fn manifest(names: &[&str]) -> Document {
        let layers: Vec<Value> = names.iter().map(|name| layer(name)).collect();
        let config =
            json!({"mediaType": OCI_CONFIG, "digest": BlobDigest::of(b"c").to_string(), "size": 1});
        let value = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers,
            "annotations": {"z": "1"},
        });
        Document::of_value(OCI_MANIFEST, value)
    }

    fn list(names: &[&str], chunks: &[(u16, u32)]) -> BootList {
        let indexes = names.iter().map(|name| index(name)).collect();
        let chunk = |(layer, chunk): &(u16, u32)| BootChunk {
            layer: *layer,
            chunk: *chunk,
        };
        BootList::new(indexes, chunks.iter().map(chunk).collect()).unwrap()
    }

    fn boot_of(document: &Document) -> Vec<Option<BootPart>> {
        let layers = document.list("layers").unwrap();
        let texts = layers.iter().map(|layer| -> Vec<&String> {
            let texts = BOOT.iter().map_while(|name| layer.annotations.get(*name));
            texts.collect()
        });
        texts
            .map(|texts| (!texts.is_empty()).then(|| BootPart::from_texts(&texts).unwrap()))
            .collect()
    }

    #[test]
    fn lists_are_attached_to_their_layers_and_nothing_else_changes() {
        let manifest = manifest(&["a", "", "b", "c"]);
        let runs = runs(&manifest).unwrap();
        let places: Vec<usize> = runs.iter().map(|run| run.first).collect();
        assert_eq!(places, [0, 2]);
        let first = list(&["b", "c"], &[(1, 7), (0, 3), (1, 8)]);
        let (changed, attached) = annotate(&manifest, &[(runs[1].clone(), first.clone())]);
        let found = boot_of(&changed);
        assert_eq!(found, [None, None, first.part(0), first.part(1)]);
        let expected = [(2, 1), (3, 2)].map(|(layer, count)| Attached {
            layer,
            listed: count,
            attached: count,
        });
        assert_eq!(attached, expected);
        // Without it the manifest is what it was, byte for byte.
        let mut value = changed.value.clone();
        for number in [2, 3] {
            let annotations = value["layers"][number]["annotations"]
                .as_object_mut()
                .unwrap();
            annotations.shift_remove(BOOT[0]);
        }
        assert_eq!(value.to_string(), manifest.value.to_string());
        // The same again changes nothing; another one replaces it all.
        let (again, _) = annotate(&changed, &[(runs[1].clone(), first)]);
        assert_eq!(again.digest, changed.digest);
        let other = list(&["b", "c"], &[(0, 1)]);
        let (again, _) = annotate(&changed, &[(runs[1].clone(), other.clone())]);
        assert_eq!(boot_of(&again), [None, None, other.part(0), None]);
        // A list of other layers is none of this run.
        let wrong = list(&["a", "c"], &[(0, 1)]);
        let (same, _) = annotate(&manifest, &[(runs[1].clone(), wrong)]);
        assert_eq!(same.digest, manifest.digest);
    }

    #[test]
    fn a_long_list_is_cut_to_what_labels_hold() {
        let manifest = manifest(&["a"]);
        let run = runs(&manifest).unwrap().remove(0);
        let chunks: Vec<(u16, u32)> = (0..16_000).map(|n| (0, (n * 7919) % 100_003)).collect();
        let list = list(&["a"], &chunks);
        let (changed, attached) = annotate(&manifest, &[(run, list.clone())]);
        let layer = &changed.list("layers").unwrap()[0];
        for name in BOOT {
            assert!(name.len() + layer.annotations[name].len() < 4096);
        }
        let part = boot_of(&changed).remove(0).unwrap();
        let whole = list.part(0).unwrap();
        assert_eq!(
            (attached[0].listed, attached[0].attached),
            (16_000, part.chunks().len())
        );
        assert_eq!(part.chunks(), &whole.chunks()[..part.chunks().len()]);
        assert!(matches!(
            LayerMark::parse(|name| layer.annotations.get(name).map(String::as_str)),
            Ok(LayerMark::Lazy(layer)) if layer.boot.len() == BOOT.len()
        ));
        // A shorter one leaves nothing of it.
        let run = runs(&changed).unwrap().remove(0);
        let short = self::list(&["a"], &[(0, 5)]);
        let (changed, _) = annotate(&changed, &[(run, short.clone())]);
        let layer = &changed.list("layers").unwrap()[0];
        assert_eq!(boot_of(&changed), [short.part(0)]);
        assert!(!layer.annotations.contains_key(BOOT[1]));
    }

    #[tokio::test]
    async fn an_index_names_the_new_manifest_and_what_speaks_of_it() {
        let store = MemoryImage::new("image");
        let (ours, theirs) = (manifest(&["a"]), manifest(&["b"]));
        for blob in ["a", "b", "c"] {
            store.insert_blob(blob);
        }
        let mut entries: Vec<Value> = Vec::new();
        for (document, arch) in [(&ours, "amd64"), (&theirs, "arm64")] {
            store.insert_document(document, false);
            let mut entry = serde_json::to_value(document.descriptor()).unwrap();
            entry["platform"] = json!({"architecture": arch, "os": "linux"});
            entries.push(entry);
        }
        let attestation = Document::of_value(
            OCI_MANIFEST,
            json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": []}),
        );
        store.insert_document(&attestation, false);
        let mut entry = serde_json::to_value(attestation.descriptor()).unwrap();
        entry["annotations"] = json!({"vnd.docker.reference.digest": ours.digest.to_string()});
        entry["platform"] = json!({"architecture": "unknown", "os": "unknown"});
        entries.push(entry);
        let value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        let root = Document::of_value(OCI_INDEX, value);
        store.insert_document(&root, true);

        let tree = read_tree(&store).await.unwrap();
        assert_eq!(tree.manifests.len(), 2);
        let run = runs(&ours).unwrap().remove(0);
        let (changed, _) = annotate(&ours, &[(run, list(&["a"], &[(0, 5)]))]);
        let (new, documents) = replace(&tree, vec![changed.clone(), theirs.clone()]);
        assert_eq!(
            documents.iter().map(|it| it.digest).collect::<Vec<_>>(),
            [changed.digest]
        );
        let destination: Arc<dyn ImageWriter> = Arc::new(store);
        write(&destination, &new, &documents).await.unwrap();
        let tree = read_tree(&*destination).await.unwrap();
        assert_eq!(tree.root.digest, new.digest);
        let digests: Vec<BlobDigest> = tree.manifests.iter().map(|(_, it)| it.digest).collect();
        assert_eq!(digests, [changed.digest, theirs.digest]);
        let entries = tree.root.list("manifests").unwrap();
        let platform = entries[0].platform.clone().unwrap();
        assert_eq!(platform.to_string(), "linux/amd64");
        let attested = &entries[2].annotations["vnd.docker.reference.digest"];
        assert_eq!(*attested, changed.digest.to_string());
        // Nothing to change, nothing to store.
        let same: Vec<Document> = tree.manifests.iter().map(|(_, it)| it.clone()).collect();
        let (same, documents) = replace(&tree, same);
        assert_eq!((same.digest, documents.len()), (new.digest, 0));
    }
}
