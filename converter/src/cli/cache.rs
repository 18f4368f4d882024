// SPDX-License-Identifier: Apache-2.0
//! `sluice cache`: what the chunk store holds, and what may go.

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sluice_proto::control::{
    CacheRequest, CacheResponse, EvictRequest, EvictResponse, PinRequest, PinResponse, PinnedImage,
};

use super::control::{CALL_TIMEOUT, DaemonArguments, connect, within};
use super::show::{Table, bytes, printable, short};

/// How long an eviction may take: files of many gigabytes are deleted.
const EVICT_TIMEOUT: Duration = Duration::from_secs(300);

/// What can be done with the chunk store.
#[derive(Debug, Subcommand)]
pub(super) enum Cache {
    /// List the layers in the chunk store, the least recently used first, and why they stay.
    Ls(List),
    /// Take layers that nobody uses out of the chunk store. They are fetched anew when they are wanted.
    Evict(Evict),
    /// Keep the layers of an image from eviction.
    Pin(Pin),
    /// Let the layers of an image be evicted again.
    Unpin(Pin),
}

/// Arguments of `cache ls`.
#[derive(Debug, Args)]
pub(super) struct List {
    #[command(flatten)]
    daemon: DaemonArguments,
}

/// Arguments of `cache evict`.
#[derive(Debug, Args)]
pub(super) struct Evict {
    /// Image (reference, manifest digest, config digest) or diff ID of a layer.
    #[arg(required_unless_present = "unused", conflicts_with = "unused")]
    target: Option<String>,
    /// All layers that nobody uses and nobody pinned.
    #[arg(long)]
    unused: bool,
    /// containerd namespace. Default: all.
    #[arg(long, short, default_value = "")]
    namespace: String,
    #[command(flatten)]
    daemon: DaemonArguments,
}

/// Arguments of `cache pin` and `cache unpin`.
#[derive(Debug, Args)]
pub(super) struct Pin {
    /// Reference, manifest digest or config digest.
    image: String,
    /// containerd namespace. Default: all.
    #[arg(long, short, default_value = "")]
    namespace: String,
    #[command(flatten)]
    daemon: DaemonArguments,
}

pub(super) async fn run(cache: Cache) -> anyhow::Result<()> {
    match cache {
        Cache::Ls(arguments) => list(arguments).await,
        Cache::Evict(arguments) => evict(arguments).await,
        Cache::Pin(arguments) => pin(arguments, false).await,
        Cache::Unpin(arguments) => pin(arguments, true).await,
    }
}

async fn list(arguments: List) -> anyhow::Result<()> {
    let mut client = connect(arguments.daemon.socket()).await?;
    let answer = within(CALL_TIMEOUT, client.cache(CacheRequest {})).await?;
    let answer = answer.into_inner();
    let mut out = io::stdout().lock();
    match arguments.daemon.json() {
        true => writeln!(out, "{}", list_json(&answer))?,
        false => write_cache(&mut out, &answer, SystemTime::now())?,
    }
    Ok(())
}

/// `3 h`: how long ago, in the largest unit that is not zero.
fn ago(seconds: u64, now: SystemTime) -> String {
    let then = UNIX_EPOCH + Duration::from_secs(seconds);
    // A clock that was set back makes it now.
    let age = now.duration_since(then).unwrap_or_default().as_secs();
    match age {
        0..60 => format!("{age} s"),
        60..3600 => format!("{} min", age / 60),
        3600..86400 => format!("{} h", age / 3600),
        _ => format!("{} d", age / 86400),
    }
}

fn write_cache(out: &mut impl Write, answer: &CacheResponse, now: SystemTime) -> io::Result<()> {
    let budget = match answer.budget_bytes {
        0 => "no budget".to_owned(),
        budget => format!("budget {}", bytes(budget)),
    };
    let (held, stays) = (bytes(answer.held_bytes), bytes(answer.pinned_bytes));
    writeln!(out, "store: {held}, of which {stays} stay; {budget}")?;
    let mut layers = Table::new(&[
        "DIFF ID",
        "HELD",
        "PRESENT",
        "SEALED",
        "LAST USED",
        "STAYS",
        "IMAGES",
    ]);
    for layer in &answer.layers {
        let percent = layer.present_bytes.saturating_mul(100);
        let percent = percent.checked_div(layer.device_bytes).unwrap_or(100);
        let dash = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
        layers.row([
            short(&layer.diff_id).to_owned(),
            bytes(layer.held_bytes),
            format!("{percent} %"),
            if layer.sealed { "yes" } else { "no" }.to_owned(),
            ago(layer.last_used, now),
            dash(&layer.stays),
            dash(&layer.images.join(" ")),
        ]);
    }
    layers.write(out)?;
    if !answer.pins.is_empty() {
        let mut pins = Table::new(&["PINNED", "NAMESPACE", "MANIFEST", "LAYERS", "HELD"]);
        for pin in &answer.pins {
            pins.row([
                pin.image.clone(),
                pin.namespace.clone(),
                short(&pin.manifest_digest).to_owned(),
                pin.layers.to_string(),
                bytes(pin.held_bytes),
            ]);
        }
        writeln!(out)?;
        pins.write(out)?;
    }
    Ok(())
}

fn pins_json(pins: &[PinnedImage]) -> Value {
    let pin = |pin: &PinnedImage| {
        json!({
            "image": pin.image,
            "namespace": pin.namespace,
            "manifest_digest": pin.manifest_digest,
            "layers": pin.layers,
            "held_bytes": pin.held_bytes,
        })
    };
    pins.iter().map(pin).collect()
}

fn list_json(answer: &CacheResponse) -> Value {
    json!({
        "budget_bytes": answer.budget_bytes,
        "held_bytes": answer.held_bytes,
        "pinned_bytes": answer.pinned_bytes,
        "pins": pins_json(&answer.pins),
        "layers": answer.layers.iter().map(|layer| json!({
            "diff_id": layer.diff_id,
            "index_digest": layer.index_digest,
            "images": layer.images,
            "held_bytes": layer.held_bytes,
            "device_bytes": layer.device_bytes,
            "present_bytes": layer.present_bytes,
            "sealed": layer.sealed,
            "last_used": layer.last_used,
            "stays": layer.stays,
        })).collect::<Vec<_>>(),
    })
}

async fn evict(arguments: Evict) -> anyhow::Result<()> {
    let mut client = connect(arguments.daemon.socket()).await?;
    let target = arguments.target.unwrap_or_default();
    let request = EvictRequest {
        target: target.clone(),
        namespace: arguments.namespace,
        unused: arguments.unused,
    };
    let answer = within(EVICT_TIMEOUT, client.evict(request)).await?;
    let answer = answer.into_inner();
    let mut out = io::stdout().lock();
    match arguments.daemon.json() {
        true => writeln!(out, "{}", evicted_json(&answer))?,
        false => write_evicted(&mut out, &answer)?,
    }
    let stay = answer.layers.iter().filter(|layer| !layer.stays.is_empty());
    let stay = stay.count();
    // Who named something wants it gone.
    if stay > 0 && !arguments.unused {
        bail!("{stay} layers of {target} stay");
    }
    Ok(())
}

fn write_evicted(out: &mut impl Write, answer: &EvictResponse) -> io::Result<()> {
    for layer in &answer.layers {
        let what = match layer.stays.as_str() {
            "" => format!("evicted, {}", bytes(layer.freed_bytes)),
            reason => format!("stays: {reason}"),
        };
        writeln!(out, "{}  {}", short(&layer.diff_id), printable(&what))?;
    }
    let freed = answer.layers.iter().map(|layer| layer.freed_bytes).sum();
    writeln!(out, "freed {}", bytes(freed))
}

fn evicted_json(answer: &EvictResponse) -> Value {
    json!({
        "layers": answer.layers.iter().map(|layer| json!({
            "diff_id": layer.diff_id,
            "index_digest": layer.index_digest,
            "freed_bytes": layer.freed_bytes,
            "stays": layer.stays,
        })).collect::<Vec<_>>(),
    })
}

async fn pin(arguments: Pin, unpin: bool) -> anyhow::Result<()> {
    let mut client = connect(arguments.daemon.socket()).await?;
    let request = PinRequest {
        image: arguments.image,
        namespace: arguments.namespace,
        unpin,
    };
    let answer = within(CALL_TIMEOUT, client.pin(request)).await?;
    let PinResponse { pins } = answer.into_inner();
    let mut out = io::stdout().lock();
    if arguments.daemon.json() {
        writeln!(out, "{}", json!({ "pins": pins_json(&pins) }))?;
        return Ok(());
    }
    let word = if unpin { "unpinned" } else { "pinned" };
    for pin in &pins {
        let line = format!(
            "{word} {} in {}: {} layers, {}",
            pin.image,
            pin.namespace,
            pin.layers,
            bytes(pin.held_bytes)
        );
        writeln!(out, "{}", printable(&line))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_proto::control::{CachedLayer, EvictedLayer};

    #[test]
    fn a_cache_reads_well() {
        let answer = CacheResponse {
            layers: vec![CachedLayer {
                diff_id: "sha256:0123456789abcdef".into(),
                images: vec!["r.test/a:1".into()],
                held_bytes: 2048,
                device_bytes: 4096,
                present_bytes: 1024,
                last_used: 1000,
                stays: "mounted".into(),
                ..CachedLayer::default()
            }],
            pins: vec![PinnedImage {
                image: "r.test/a:1".into(),
                namespace: "default".into(),
                layers: 1,
                held_bytes: 2048,
                ..PinnedImage::default()
            }],
            budget_bytes: 1 << 30,
            held_bytes: 2048,
            pinned_bytes: 2048,
        };
        let mut out = Vec::new();
        let now = UNIX_EPOCH + Duration::from_secs(1000 + 7300);
        write_cache(&mut out, &answer, now).unwrap();
        let text = String::from_utf8(out).unwrap();
        for expected in [
            "store: 2.00 KiB, of which 2.00 KiB stay; budget 1.00 GiB",
            "0123456789ab  2.00 KiB  25 %     no      2 h        mounted  r.test/a:1",
            "r.test/a:1  default",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
        assert_eq!(list_json(&answer)["layers"][0]["present_bytes"], 1024);
    }

    #[test]
    fn an_eviction_says_what_stays() {
        let layer = |freed_bytes, stays: &str| EvictedLayer {
            diff_id: "sha256:0123456789abcdef".into(),
            freed_bytes,
            stays: stays.into(),
            ..EvictedLayer::default()
        };
        let answer = EvictResponse {
            layers: vec![layer(1024, ""), layer(0, "mounted")],
        };
        let mut out = Vec::new();
        write_evicted(&mut out, &answer).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.contains("stays: mounted") && text.ends_with("freed 1.00 KiB\n"),
            "{text}"
        );
    }

    #[test]
    fn ages_are_said_in_one_unit() {
        let now = UNIX_EPOCH + Duration::from_secs(10_000_000);
        for (age, expected) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (3600, "1 h"),
            (200_000, "2 d"),
        ] {
            assert_eq!(ago(10_000_000 - age, now), expected);
        }
        assert_eq!(ago(20_000_000, now), "0 s");
    }
}
