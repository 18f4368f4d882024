// SPDX-License-Identifier: Apache-2.0
//! Editing containerd's `config.toml` so that containerd knows Sluice.
//!
//! Everything here is pure: text in, text out. [`apply`] adds or updates our keys and [`undo`] takes
//! exactly these away again. What is ours is written in the file itself, so that it survives moves
//! and restarts of anything:
//!
//! - a table that we made carries [`TABLE_MARK`] as a comment above its header;
//! - a key that we put into somebody else's table carries [`KEY_ADDED`] behind its value;
//! - a value that we replaced carries [`KEY_REPLACED`] and the old value behind it.
//!
//! Invariants, each with a test: `apply` is idempotent; comments and order of everything else stay;
//! `undo(apply(text)) == text` byte for byte.

use toml_edit::{Array, ArrayOfTables, DocumentMut, InlineTable, Item, Table, Value};

pub mod hosts;
#[cfg(test)]
mod tests;

/// The comment line above a table that `sluice setup containerd` made.
pub const TABLE_MARK: &str = "# added by `sluice setup containerd`";
/// Behind a value that was not there before.
const KEY_ADDED: &str = " # sluice setup: added";
/// Behind a value that replaced another; the old one follows, then [`REPLACED_END`].
const KEY_REPLACED: &str = " # sluice setup: before ";
/// Ends the old value, before what stood behind it on its line.
const REPLACED_END: &str = " |";
/// The name under which containerd knows us.
const PLUGIN: &str = "sluice";

/// All that we ever write into tables of our own, which needs no mark key by key.
const OUR_KEYS: &[&str] = &[
    "type",
    "address",
    "capabilities",
    "root",
    "enable_remote_snapshot_annotations",
    "snapshotter",
    "disable_snapshot_annotations",
];

/// What the configuration shall say.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The socket on which `sluiced` serves containerd.
    pub address: String,
    /// The daemon's root directory, exported so that tools measure the right file system.
    pub root: String,
    /// Also makes Sluice the snapshotter of the CRI plugin (Kubernetes).
    pub cri: bool,
    /// containerd's major version if known: 2 has a transfer service that must be told as well.
    pub containerd_major: Option<u32>,
}

/// Why a configuration could not be edited.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The file is not TOML.
    #[error("parse config")]
    Parse(#[from] toml_edit::TomlError),
    /// A key that must be a table is something else.
    #[error("config key {path} is not a table: write it as [{path}]")]
    NotATable {
        /// Dotted path of the key.
        path: String,
    },
    /// `version` is something that this code does not know.
    #[error("config version {0} is unknown (1 to 4 are known)")]
    Version(i64),
}

/// Adds our keys to `text`, or updates them. **Errors**: [`SetupError`], all permanent.
pub fn apply(text: &str, wanted: &Wanted) -> Result<String, SetupError> {
    let mut doc: DocumentMut = text.parse()?;
    if text.trim().is_empty() {
        // Without a version containerd reads version 1, which it will drop; 2 is read by all.
        doc["version"] = toml_edit::value(2);
        mark_value(&mut doc["version"], KEY_ADDED);
    }
    let version = config_version(&doc)?;
    let root = doc.as_table_mut();
    let plugin = table_at(root, &["proxy_plugins", PLUGIN])?;
    set(plugin, "type", "snapshot".into());
    set(plugin, "address", wanted.address.as_str().into());
    let modern = version >= 3 || wanted.containerd_major.is_some_and(|major| major >= 2);
    if modern {
        // So that containers with user namespaces get idmapped mounts and not a copy of each file.
        let capabilities: Array = ["remap-ids"].into_iter().collect();
        set(plugin, "capabilities", Value::Array(capabilities));
    }
    let exports = table_at(root, &["proxy_plugins", PLUGIN, "exports"])?;
    set(exports, "root", wanted.root.as_str().into());
    // Read by the transfer service of containerd 2; other versions ignore it.
    set(exports, "enable_remote_snapshot_annotations", "true".into());
    if wanted.cri {
        // Version 4, of containerd 2.3, kept what version 3 has for us.
        let images: &[&str] = &["plugins", "io.containerd.cri.v1.images"];
        let paths: &[&[&str]] = match version {
            1 => &[&["plugins", "cri", "containerd"]],
            // containerd 2 drops these two keys of version 2 when it finds no runtimes beside them, and reads those of
            // version 3 in any version.
            2 if modern => &[
                &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
                images,
            ],
            2 => &[&["plugins", "io.containerd.grpc.v1.cri", "containerd"]],
            _ => &[images],
        };
        for path in paths {
            let cri = table_at(root, path)?;
            set(cri, "snapshotter", PLUGIN.into());
            set(cri, "disable_snapshot_annotations", false.into());
        }
    }
    if modern {
        add_unpack_config(root)?;
    }
    Ok(doc.to_string())
}

/// Takes away what [`apply`] added and puts back what it replaced. Text without our marks stays as it is.
pub fn undo(text: &str) -> Result<String, SetupError> {
    let mut doc: DocumentMut = text.parse()?;
    undo_table(doc.as_table_mut());
    Ok(doc.to_string())
}

/// Whether `text` has anything that [`apply`] wrote.
pub fn is_edited(text: &str) -> bool {
    [TABLE_MARK, KEY_ADDED, KEY_REPLACED]
        .iter()
        .any(|mark| text.contains(mark))
}

/// The schema version that a configuration declares; 1 if it does not.
pub fn config_version(doc: &DocumentMut) -> Result<i64, SetupError> {
    match doc.get("version").and_then(Item::as_integer) {
        None => Ok(1),
        Some(version @ 1..=4) => Ok(version),
        Some(version) => Err(SetupError::Version(version)),
    }
}

/// containerd's own root directory, as its configuration says.
pub fn containerd_root(text: &str) -> Result<String, SetupError> {
    let doc: DocumentMut = text.parse()?;
    let root = doc
        .get("root")
        .and_then(Item::as_str)
        .filter(|root| !root.is_empty());
    Ok(root.unwrap_or("/var/lib/containerd").to_owned())
}

/// The root directory of `sluiced` that the configuration exports to containerd, if it does.
pub fn exported_root(text: &str) -> Result<Option<String>, SetupError> {
    let doc: DocumentMut = text.parse()?;
    let path = ["proxy_plugins", PLUGIN, "exports", "root"];
    let root = path
        .iter()
        .try_fold(doc.as_item(), |item, name| item.get(name))
        .and_then(Item::as_str);
    Ok(root.map(str::to_owned))
}

/// The table at `path`, made and marked where it does not exist.
fn table_at<'a>(root: &'a mut Table, path: &[&str]) -> Result<&'a mut Table, SetupError> {
    let mut table = root;
    for (depth, name) in path.iter().enumerate() {
        let last = depth + 1 == path.len();
        if !table.contains_key(name) {
            let mut made = Table::new();
            made.set_implicit(!last);
            if last {
                mark_table(&mut made);
            }
            table.insert(name, Item::Table(made));
        }
        let not_a_table = || SetupError::NotATable {
            path: path[..=depth].join("."),
        };
        table = table[name].as_table_mut().ok_or_else(not_a_table)?;
        if last && table.is_implicit() {
            // Only its children had headers; now it needs one of its own.
            table.set_implicit(false);
            mark_table(table);
        }
    }
    Ok(table)
}

fn mark_table(table: &mut Table) {
    table.decor_mut().set_prefix(format!("\n{TABLE_MARK}\n"));
}

fn is_marked(table: &Table) -> bool {
    let prefix = table.decor().prefix().and_then(|prefix| prefix.as_str());
    prefix.is_some_and(|prefix| prefix.contains(TABLE_MARK))
}

fn suffix_of(value: &Value) -> String {
    value
        .decor()
        .suffix()
        .and_then(|suffix| suffix.as_str())
        .unwrap_or_default()
        .to_owned()
}

fn mark_value(item: &mut Item, mark: &str) {
    if let Some(value) = item.as_value_mut() {
        value.decor_mut().set_suffix(mark);
    }
}

/// Sets `key`, remembering in the file what was there. A value that is right already is not touched.
fn set(table: &mut Table, key: &str, wanted: Value) {
    let ours = is_marked(table);
    let Some(value) = table.get_mut(key).and_then(Item::as_value_mut) else {
        let mut item = Item::Value(wanted);
        if !ours {
            mark_value(&mut item, KEY_ADDED);
        }
        table.insert(key, item);
        return;
    };
    if !same(value, &wanted) {
        replace(table, key, wanted);
    }
}

/// Puts `wanted` over the value of `key`, with the old value behind it unless that was ours.
fn replace(table: &mut Table, key: &str, wanted: Value) {
    let ours = is_marked(table);
    let Some(value) = table.get_mut(key).and_then(Item::as_value_mut) else {
        return;
    };
    let suffix = suffix_of(value);
    let already_ours = suffix.starts_with(KEY_ADDED) || suffix.starts_with(KEY_REPLACED);
    let mut before = value.clone();
    before.decor_mut().clear();
    let suffix = match ours || already_ours {
        true => suffix,
        false => format!(
            "{KEY_REPLACED}{}{REPLACED_END}{suffix}",
            on_one_line(&before.to_string())
        ),
    };
    let prefix = value
        .decor()
        .prefix()
        .and_then(|prefix| prefix.as_str())
        .unwrap_or(" ")
        .to_owned();
    *value = wanted.decorated(prefix, suffix);
}

/// A value's text as part of a comment: arrays may span lines.
fn on_one_line(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('\n', "\\n")
        .replace('|', "\\p")
}

/// The opposite of [`on_one_line`].
fn from_one_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => match chars.next() {
                Some('n') => out.push('\n'),
                Some('p') => out.push('|'),
                Some(other) => out.push(other),
                None => {}
            },
            (c, false) => out.push(c),
        }
    }
    out
}

fn same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::String(left), Value::String(right)) => left.value() == right.value(),
        (Value::Boolean(left), Value::Boolean(right)) => left.value() == right.value(),
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len()
                && left
                    .iter()
                    .zip(right)
                    .all(|(left, right)| same(left, right))
        }
        _ => false,
    }
}

/// containerd 2 pulls for CRI, `ctr` and others by its transfer service, which unpacks for the snapshotters it is told.
fn add_unpack_config(root: &mut Table) -> Result<(), SetupError> {
    let transfer = table_at(root, &["plugins", "io.containerd.transfer.v1.local"])?;
    let ours = |item: &dyn toml_edit::TableLike| {
        item.get("snapshotter").and_then(Item::as_str) == Some(PLUGIN)
    };
    match transfer.get_mut("unpack_config") {
        Some(Item::ArrayOfTables(tables)) => {
            if !tables.iter().any(|table| ours(table)) {
                tables.push(unpack_table(PLUGIN));
            }
        }
        Some(Item::Value(Value::Array(array))) => {
            if !array
                .iter()
                .filter_map(Value::as_inline_table)
                .any(|table| ours(table))
            {
                let mut longer = array.clone();
                push_inline(&mut longer);
                replace(transfer, "unpack_config", Value::Array(longer));
            }
        }
        _ => {
            // A list replaces containerd's default, which must therefore be repeated.
            let mut tables = ArrayOfTables::new();
            tables.push(unpack_table("overlayfs"));
            tables.push(unpack_table(PLUGIN));
            transfer.insert("unpack_config", Item::ArrayOfTables(tables));
        }
    }
    Ok(())
}

fn unpack_table(snapshotter: &str) -> Table {
    let mut table = Table::new();
    mark_table(&mut table);
    table.insert("platform", toml_edit::value("linux"));
    table.insert("snapshotter", toml_edit::value(snapshotter));
    table
}

fn push_inline(array: &mut Array) {
    let names: &[&str] = if array.is_empty() {
        &["overlayfs", PLUGIN]
    } else {
        &[PLUGIN]
    };
    for name in names {
        let mut table = InlineTable::new();
        table.insert("platform", "linux".into());
        table.insert("snapshotter", (*name).into());
        array.push(Value::InlineTable(table));
    }
}

/// Undoes in `table` and below. Keys that somebody else added to our tables stay, and so do the tables.
fn undo_table(table: &mut Table) {
    if is_marked(table) {
        for key in OUR_KEYS {
            table.remove(key);
        }
    }
    let keys: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).collect();
    for key in keys {
        let Some(item) = table.get_mut(&key) else {
            continue;
        };
        let remove = match item {
            Item::Value(value) => undo_value(value),
            Item::Table(child) => undo_child(child),
            Item::ArrayOfTables(tables) => {
                let before = tables.len();
                tables.retain(|table| !is_marked(table));
                tables.is_empty() && before > 0
            }
            Item::None => false,
        };
        if remove {
            table.remove(&key);
        }
    }
}

/// Undoes below `child` and says whether it shall go.
fn undo_child(child: &mut Table) -> bool {
    let made_for_us = child.is_implicit();
    undo_table(child);
    let has_values = child.iter().any(|(_, item)| item.is_value());
    if is_marked(child) && !has_values {
        child.set_implicit(true);
        child.decor_mut().clear();
        return child.is_empty();
    }
    made_for_us && child.is_empty()
}

/// Puts the old value back and says whether the key shall go.
fn undo_value(value: &mut Value) -> bool {
    let suffix = suffix_of(value);
    if suffix.starts_with(KEY_ADDED) {
        return true;
    }
    let Some((old, rest)) = suffix
        .strip_prefix(KEY_REPLACED)
        .and_then(|text| text.split_once(REPLACED_END))
    else {
        return false;
    };
    if let Ok(old) = from_one_line(old).parse::<Value>() {
        let prefix = value
            .decor()
            .prefix()
            .and_then(|prefix| prefix.as_str())
            .unwrap_or(" ");
        let prefix = prefix.to_owned();
        *value = old.decorated(prefix, rest);
    }
    false
}
