// SPDX-License-Identifier: Apache-2.0
//! What a conversion tells while it runs.

use super::*;

/// Remembers what it was told.
#[derive(Debug, Default)]
struct Told(std::sync::Mutex<Vec<(u64, u64)>>);

impl Reporter for Told {
    fn event(&self, _: &Event) {}
    fn progress(&self, _: &str, _: u64) {}
    fn uploading(&self, source: &str, sent_bytes: u64, total_bytes: u64) {
        assert!(source.starts_with("sha256:"));
        self.0.lock().unwrap().push((sent_bytes, total_bytes));
    }
}

/// Remembers which events of signatures it was told.
#[derive(Debug, Default)]
struct ToldSigned(std::sync::Mutex<Vec<(String, String)>>);

impl Reporter for ToldSigned {
    fn event(&self, event: &Event) {
        if let Event::Signed {
            manifest, digest, ..
        } = event
        {
            let told = (manifest.clone(), digest.clone());
            self.0.lock().unwrap().push(told);
        }
    }
    fn progress(&self, _: &str, _: u64) {}
    fn uploading(&self, _: &str, _: u64, _: u64) {}
}

#[tokio::test]
async fn a_signed_image_is_said_to_be_signed_no_more() {
    let mut builder = Builder::new();
    let (original, _) = builder.ordinary();
    let destination = MemoryImage::new("destination");
    let told = async |source: &MemoryImage| {
        let told = Arc::new(ToldSigned::default());
        let done = convert(
            Arc::new(source.clone()),
            Arc::new(destination.clone()),
            options(1),
            Arc::<ToldSigned>::clone(&told),
        );
        let digest = done.await.unwrap().digest;
        (told.0.lock().unwrap().clone(), digest)
    };
    assert_eq!(told(&builder.store).await.0, []);
    builder.store.signed = Some(original.digest);
    let (signed, digest) = told(&builder.store).await;
    assert_eq!(signed, [(original.digest.to_string(), digest.clone())]);
    // What keeps its digest keeps its signature.
    let mut converted = destination.clone();
    converted.signed = Some(digest.parse().unwrap());
    assert_eq!(told(&converted).await.0, []);
}

#[tokio::test]
async fn uploads_tell_how_far_they_are() {
    let builder = Builder::new();
    builder.ordinary();
    let destination = MemoryImage::new("destination");
    let told = Arc::new(Told::default());
    convert(
        Arc::new(builder.store.clone()),
        Arc::new(destination.clone()),
        options(1),
        Arc::<Told>::clone(&told),
    )
    .await
    .unwrap();
    let layers = destination.root().await.unwrap().list("layers").unwrap();
    let mut sizes: Vec<_> = layers
        .iter()
        .map(|layer| (layer.size, layer.size))
        .collect();
    let mut told = told.0.lock().unwrap().clone();
    sizes.sort_unstable();
    told.sort_unstable();
    assert_eq!(told, sizes);
}
