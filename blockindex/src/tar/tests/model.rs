// SPDX-License-Identifier: Apache-2.0
//! A naive model of what a tar means: a flat map from path to inode, built from entries that were
//! never bytes. It shares no code with the scanner.

use std::collections::BTreeMap;

use super::write::Spec;
use crate::tree::{InodeId, InodeKind, Tree};

/// All that can be seen of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// `file`, `dir`, `link`, `char`, `block`, `fifo`, with `implicit` and `opaque` marks.
    pub kind: String,
    /// Content, or target of a symlink.
    pub bytes: Vec<u8>,
    pub device: (u32, u32),
    pub mode: u16,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode.
    pub first_name: String,
}

/// Everything that can be seen, by path.
pub(crate) type View = BTreeMap<String, Seen>;

#[derive(Debug, Default)]
struct Model {
    paths: BTreeMap<String, usize>,
    inodes: Vec<Seen>,
    directories: Vec<(String, (i64, u32))>,
}

/// What the entries make, or `None` where containerd would refuse the layer.
pub(crate) fn view(specs: &[Spec]) -> Option<View> {
    let mut model = Model::default();
    model.add("", directory(true));
    specs.iter().try_for_each(|spec| model.apply(spec))?;
    for (path, mtime) in std::mem::take(&mut model.directories) {
        let path = model.resolve(&path)?;
        let inode = *model.paths.get(&path)?;
        model.inodes[inode].mtime = mtime;
    }
    let mut first: BTreeMap<usize, String> = BTreeMap::new();
    for (path, inode) in &model.paths {
        first.entry(*inode).or_insert_with(|| path.clone());
    }
    let seen = |inode: &usize| Seen {
        first_name: first[inode].clone(),
        ..model.inodes[*inode].clone()
    };
    Some(
        model
            .paths
            .iter()
            .map(|(path, inode)| (path.clone(), seen(inode)))
            .collect(),
    )
}

fn directory(implicit: bool) -> Seen {
    Seen {
        kind: if implicit { "dir implicit" } else { "dir" }.into(),
        bytes: vec![],
        device: (0, 0),
        mode: 0o755,
        owner: (0, 0),
        mtime: (0, 0),
        xattrs: BTreeMap::new(),
        first_name: String::new(),
    }
}

fn cleaned(path: &str) -> String {
    let mut parts: Vec<&str> = vec![];
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() {
        name.into()
    } else {
        format!("{directory}/{name}")
    }
}

impl Model {
    fn add(&mut self, path: &str, seen: Seen) {
        self.inodes.push(seen);
        self.paths.insert(path.into(), self.inodes.len() - 1);
    }

    fn get(&self, path: &str) -> Option<&Seen> {
        self.paths.get(path).map(|inode| &self.inodes[*inode])
    }

    fn is_directory(&self, path: &str) -> bool {
        self.get(path)
            .is_some_and(|seen| seen.kind.starts_with("dir"))
    }

    /// Substitutes the first symlink on the way until there is none.
    fn resolve(&self, path: &str) -> Option<String> {
        let mut path = path.to_owned();
        'again: for _ in 0..=255 {
            let mut done = String::new();
            let parts: Vec<&str> = path.split('/').collect();
            for (at, part) in parts.iter().enumerate() {
                if matches!(*part, "" | ".") {
                    continue;
                }
                if *part == ".." {
                    done = done
                        .rsplit_once('/')
                        .map_or(String::new(), |(up, _)| up.into());
                    continue;
                }
                let here = join(&done, part);
                match self.get(&here).filter(|seen| seen.kind == "link") {
                    None => done = here,
                    Some(link) => {
                        let target = String::from_utf8(link.bytes.clone()).unwrap();
                        let base = if target.starts_with('/') {
                            target
                        } else {
                            join(&done, &target)
                        };
                        let base = cleaned(&base);
                        let rest = parts[at + 1..].iter().copied();
                        path = std::iter::once(&base[..])
                            .chain(rest)
                            .collect::<Vec<_>>()
                            .join("/");
                        continue 'again;
                    }
                }
            }
            return Some(done);
        }
        None
    }

    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.paths
            .retain(|at, _| at != path && !at.starts_with(&below));
    }

    fn make_parents(&mut self, directory_path: &str) -> Option<()> {
        let mut at = String::new();
        for part in directory_path.split('/').filter(|part| !part.is_empty()) {
            at = join(&at, part);
            if self.get(&at).is_none() {
                self.add(&at, directory(true));
            }
            self.is_directory(&at).then_some(())?;
        }
        Some(())
    }

    fn apply(&mut self, spec: &Spec) -> Option<()> {
        let name = cleaned(std::str::from_utf8(&spec.name).unwrap());
        if name.is_empty() {
            return Some(());
        }
        let (parent, base) = name.rsplit_once('/').unwrap_or(("", &name));
        let parent = self.resolve(parent)?;
        self.make_parents(&parent)?;
        if base == ".wh..wh..opq" {
            let inode = self.paths[&parent];
            if !self.inodes[inode].kind.contains("opaque") {
                self.inodes[inode].kind += " opaque";
            }
            return Some(());
        }
        if let Some(hidden) = base.strip_prefix(".wh.") {
            if hidden.starts_with(".wh.") {
                return Some(());
            }
            let path = join(&parent, hidden);
            match self.get(&path) {
                None if matches!(hidden, "" | "." | "..") => return None,
                None => {
                    let whiteout = Seen {
                        kind: "char".into(),
                        mode: 0,
                        ..directory(false)
                    };
                    self.add(&path, whiteout);
                    return Some(());
                }
                Some(seen) => {
                    return (seen.kind == "char" && seen.device == (0, 0)).then_some(());
                }
            }
        }
        let path = join(&parent, base);
        let kind = match spec.kind {
            b'0' => "file",
            b'1' => "hard",
            b'2' => "link",
            b'3' => "char",
            b'4' => "block",
            b'5' => "dir",
            b'6' => "fifo",
            _ => return None,
        };
        let merges = kind == "dir" && self.is_directory(&path);
        if !merges {
            self.remove(&path);
        }
        if kind == "hard" {
            let target = std::str::from_utf8(&spec.link).unwrap();
            let (directory, base) = target.rsplit_once('/').unwrap_or(("", target));
            let target = join(&self.resolve(directory)?, base);
            let seen = self
                .get(&target)
                .filter(|_| !matches!(base, "" | "." | ".."))?;
            let whiteout = seen.kind == "char" && seen.device == (0, 0);
            if self.is_directory(&target) || whiteout {
                return None;
            }
            self.paths.insert(path.clone(), self.paths[&target]);
        } else if merges {
            let inode = self.paths[&path];
            self.inodes[inode].kind = self.inodes[inode].kind.replace(" implicit", "");
        } else {
            let mut seen = directory(false);
            seen.kind = kind.into();
            match kind {
                "file" => seen.bytes.clone_from(&spec.content),
                "link" => seen.bytes.clone_from(&spec.link),
                "char" | "block" => seen.device = spec.device,
                _ => {}
            }
            self.add(&path, seen);
        }
        self.attributes(&path, spec)?;
        if kind == "dir" {
            let mtime = self.get(&path)?.mtime;
            self.directories.push((name, mtime));
        }
        Some(())
    }

    fn attributes(&mut self, path: &str, spec: &Spec) -> Option<()> {
        let seen = &mut self.inodes[self.paths[path]];
        let id = |id: i64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
        seen.owner = (id(spec.uid)?, id(spec.gid)?);
        seen.mode = if seen.kind == "link" {
            0o777
        } else {
            spec.mode
        };
        seen.mtime = if spec.seconds < 0 {
            (0, 0)
        } else {
            (spec.seconds, spec.nanoseconds)
        };
        for (name, value) in &spec.xattrs {
            let name_text = String::from_utf8(name.clone()).unwrap();
            let user = name_text.starts_with("user.");
            if name_text.starts_with("trusted.") {
                continue;
            }
            if user && !(seen.kind == "file" || seen.kind.starts_with("dir")) {
                continue;
            }
            (user || name_text.starts_with("security.")).then_some(())?;
            seen.xattrs.insert(name.clone(), value.clone());
        }
        Some(())
    }
}

/// What can be seen of a scanned tree; contents are read from the tar at the runs.
pub(crate) fn view_of_tree(tree: &Tree, tar: &[u8]) -> View {
    let mut first: BTreeMap<InodeId, String> = BTreeMap::new();
    let mut paths: BTreeMap<String, InodeId> = BTreeMap::from([(String::new(), tree.root())]);
    let mut pending = vec![(String::new(), tree.root())];
    while let Some((path, id)) = pending.pop() {
        for (name, child) in tree.children(id) {
            let path = join(&path, std::str::from_utf8(name).unwrap());
            paths.insert(path.clone(), *child);
            pending.push((path, *child));
        }
    }
    for (path, id) in &paths {
        first.entry(*id).or_insert_with(|| path.clone());
    }
    paths
        .iter()
        .map(|(path, id)| {
            let inode = tree.inode(*id);
            let mut xattrs: BTreeMap<Vec<u8>, Vec<u8>> = inode
                .xattrs
                .iter()
                .map(|(k, v)| (k.to_vec(), v.to_vec()))
                .collect();
            let opaque = xattrs.remove(&b"trusted.overlay.opaque"[..]).is_some();
            let (mut kind, bytes, device) = match &inode.kind {
                InodeKind::Directory => ("dir".to_owned(), vec![], (0, 0)),
                InodeKind::Regular { size_bytes, extent } => {
                    assert_eq!(extent.is_none(), *size_bytes == 0);
                    let start = extent.map_or(0, |run| run.start_block * 512);
                    let start = usize::try_from(start).unwrap();
                    let end = start + usize::try_from(*size_bytes).unwrap();
                    ("file".into(), tar[start..end].to_vec(), (0, 0))
                }
                InodeKind::Symlink(target) => ("link".into(), target.to_vec(), (0, 0)),
                InodeKind::CharDevice(n) => ("char".into(), vec![], (n.major(), n.minor())),
                InodeKind::BlockDevice(n) => ("block".into(), vec![], (n.major(), n.minor())),
                InodeKind::Fifo => ("fifo".into(), vec![], (0, 0)),
                InodeKind::Socket => ("socket".into(), vec![], (0, 0)),
            };
            if inode.implicit {
                kind += " implicit";
            }
            if opaque {
                kind += " opaque";
            }
            let seen = Seen {
                kind,
                bytes,
                device,
                mode: inode.permissions,
                owner: (inode.uid, inode.gid),
                mtime: (inode.mtime.seconds, inode.mtime.nanoseconds),
                xattrs,
                first_name: first[id].clone(),
            };
            (path.clone(), seen)
        })
        .collect()
}
