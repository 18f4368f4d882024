// SPDX-License-Identifier: Apache-2.0
//! A made-up image: a tree over two devices, and what a reader should find in it.

use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use sluice_blockindex::erofs::{DeviceSlot, write_tree};
use sluice_blockindex::tree::{DeviceNumber, FileRun, Inode, InodeId, InodeKind, Timestamp, Tree};

/// What one path should be; names and values in hex, as they need not be text.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Expected {
    pub path: String,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: Option<u64>,
    pub mtime: (i64, i64),
    pub links: u64,
    pub rdev: u64,
    pub target: Option<String>,
    pub xattrs: Vec<(String, String)>,
    /// File with the same content, and where in it that begins.
    pub content: Option<(String, u64)>,
}

/// The image, built.
pub struct Image {
    pub tree: Vec<u8>,
    pub devices: [Vec<u8>; 2],
    pub expected: Vec<Expected>,
}

/// Which xattrs an image has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Xattrs {
    None,
    Usual,
    /// And a file `acl` of group 4242, whose ACL denies what its mode seems to allow the group.
    Acl,
}

struct Builder {
    tree: Tree,
    devices: [Vec<u8>; 2],
    random: StdRng,
    expected: Vec<Expected>,
    sources: [String; 2],
}

impl Builder {
    fn file(&mut self, parent: InodeId, name: &[u8], device: usize, content: &[u8]) -> InodeId {
        let bytes = &mut self.devices[device];
        let start_block = u64::try_from(bytes.len() / 512).unwrap();
        bytes.extend_from_slice(content);
        let padded = bytes.len().next_multiple_of(512);
        bytes.resize(padded, 0);
        let run = FileRun {
            device: u16::try_from(device + 1).unwrap(),
            start_block,
        };
        let size_bytes = u64::try_from(content.len()).unwrap();
        let kind = InodeKind::Regular {
            size_bytes,
            extent: (size_bytes > 0).then_some(run),
        };
        self.node(parent, name, kind, |_| {})
    }

    fn node(
        &mut self,
        parent: InodeId,
        name: &[u8],
        kind: InodeKind,
        edit: impl FnOnce(&mut Inode),
    ) -> InodeId {
        let mut inode = Inode::new(kind);
        inode.permissions = 0o644;
        inode.mtime = Timestamp {
            seconds: self.random.random_range(-1_000_000..2_000_000_000),
            nanoseconds: self.random.random_range(0..1_000_000_000),
        };
        inode.uid = self.random.random_range(0..70_000);
        inode.gid = self.random.random_range(0..70_000);
        edit(&mut inode);
        let id = self.tree.add(inode).unwrap();
        self.tree.insert(parent, name, id).unwrap();
        id
    }

    fn directory(&mut self, parent: InodeId, name: &[u8]) -> InodeId {
        self.node(parent, name, InodeKind::Directory, |inode| {
            inode.permissions = 0o755
        })
    }

    fn noise(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0u8; length];
        self.random.fill_bytes(&mut bytes);
        bytes
    }

    fn expect(&mut self, id: InodeId, path: &[u8], links: &dyn Fn(InodeId) -> u64) {
        let inode = self.tree.inode(id).clone();
        let (kind, mut size, mut rdev, mut target, mut content) = match &inode.kind {
            InodeKind::Directory => (0o040_000, None, 0, None, None),
            InodeKind::Regular { size_bytes, extent } => {
                let content = extent.map(|run| {
                    (
                        self.sources[usize::from(run.device) - 1].clone(),
                        run.start_block * 512,
                    )
                });
                (0o100_000, Some(*size_bytes), 0, None, content)
            }
            InodeKind::Symlink(target) => (0o120_000, None, 0, Some(hex::encode(target)), None),
            InodeKind::CharDevice(number) => (0o020_000, None, number.encoded(), None, None),
            InodeKind::BlockDevice(number) => (0o060_000, None, number.encoded(), None, None),
            InodeKind::Fifo => (0o010_000, None, 0, None, None),
            InodeKind::Socket => (0o140_000, None, 0, None, None),
        };
        let entry = Expected {
            path: hex::encode(path),
            mode: kind | u32::from(inode.permissions),
            uid: inode.uid,
            gid: inode.gid,
            size: size.take(),
            mtime: (inode.mtime.seconds, inode.mtime.nanoseconds.into()),
            links: links(id),
            rdev: std::mem::take(&mut rdev).into(),
            target: target.take(),
            xattrs: inode
                .xattrs
                .iter()
                .map(|(n, v)| (hex::encode(n), hex::encode(v)))
                .collect(),
            content: content.take(),
        };
        self.expected.push(entry);
        let children = self.tree.children(id).clone();
        for (name, child) in children {
            let below = match path.is_empty() {
                true => name.to_vec(),
                false => [path, b"/", &name].concat(),
            };
            self.expect(child, &below, links);
        }
    }
}

/// Builds an image with everything; the devices' whole bytes are put below `whole` for readers to compare with.
pub fn build(seed: u64, whole: &Path, xattrs: Xattrs) -> Image {
    let sources = ["device1", "device2"].map(|name| whole.join(name).display().to_string());
    let mut b = Builder {
        tree: Tree::new(),
        devices: [b"head".to_vec(), Vec::new()],
        random: StdRng::seed_from_u64(seed),
        expected: Vec::new(),
        sources,
    };
    b.devices[0].resize(1024, 0);
    let root = b.tree.root();
    b.tree.inode_mut(root).implicit = false;
    let data = b.directory(root, b"data");
    for number in 0..48 {
        let length = b.random.random_range(0..400_000);
        let content = b.noise(length);
        let device = number % 2;
        let name = format!("f{number:03}");
        let id = b.file(data, name.as_bytes(), device, &content);
        if number == 3 {
            let other = b.directory(root, b"other");
            b.tree.insert(other, b"hard link", id).unwrap();
        }
    }
    b.file(data, b"empty", 0, b"");
    b.file(data, b"one byte", 1, b"x");
    let big = b.noise(6 << 20);
    b.file(root, b"big", 1, &big);
    let bin = b.directory(root, b"bin");
    let cat = std::fs::read("/bin/cat").unwrap();
    let id = b.file(bin, b"cat", 0, &cat);
    b.tree.inode_mut(id).permissions = 0o4755;
    let odd = b.directory(root, b"odd");
    b.tree.inode_mut(odd).permissions = 0o1777;
    let xattr = |inode: &mut Inode, name: &[u8], value: &[u8]| {
        inode.xattrs.insert(name.into(), value.into());
    };
    if xattrs != Xattrs::None {
        xattr(b.tree.inode_mut(odd), b"trusted.overlay.opaque", b"y");
        xattr(b.tree.inode_mut(id), b"user.long", &[7; 1000]);
        xattr(b.tree.inode_mut(id), b"user.empty", b"");
        let capability = hex::decode("0100000200200000000000000000000000000000").unwrap();
        xattr(b.tree.inode_mut(id), b"security.capability", &capability);
    }
    if xattrs == Xattrs::Acl {
        let file = b.file(root, b"acl", 0, b"secret");
        let inode = b.tree.inode_mut(file);
        (inode.permissions, inode.uid, inode.gid) = (0o660, 0, 4242);
        // Version 2; tag, permissions, id: owner rw, group none, mask rw, others none.
        let entries = [(1u16, 6u16), (4, 0), (16, 6), (32, 0)];
        let mut value = 2u32.to_le_bytes().to_vec();
        for (tag, permissions) in entries {
            value.extend_from_slice(&tag.to_le_bytes());
            value.extend_from_slice(&permissions.to_le_bytes());
            value.extend_from_slice(&u32::MAX.to_le_bytes());
        }
        xattr(inode, b"system.posix_acl_access", &value);
        let open = b.file(root, b"no acl", 0, b"plain");
        let inode = b.tree.inode_mut(open);
        (inode.permissions, inode.uid, inode.gid) = (0o660, 0, 4242);
    }
    let mode = |permissions| move |inode: &mut Inode| inode.permissions = permissions;
    b.node(
        odd,
        b"short",
        InodeKind::Symlink((*b"../big").into()),
        mode(0o777),
    );
    b.node(
        odd,
        b"long",
        InodeKind::Symlink(vec![b'l'; 4000].into()),
        mode(0o777),
    );
    let device = |major, minor| DeviceNumber::new(major, minor).unwrap();
    b.node(
        odd,
        b"null",
        InodeKind::CharDevice(device(1, 3)),
        mode(0o666),
    );
    b.node(
        odd,
        b"whiteout",
        InodeKind::CharDevice(DeviceNumber::WHITEOUT),
        mode(0),
    );
    b.node(
        odd,
        b"disk",
        InodeKind::BlockDevice(device(259, 70_000)),
        mode(0o660),
    );
    b.node(odd, b"fifo", InodeKind::Fifo, mode(0o600));
    b.node(odd, b"socket", InodeKind::Socket, mode(0o755));
    b.node(odd, b"n\xff\xfe \n*", InodeKind::Fifo, mode(0o600));
    b.node(odd, &[b'n'; 255], InodeKind::Fifo, mode(0o600));
    let many = b.directory(root, b"many");
    for number in 0..3000 {
        b.node(
            many,
            format!("entry-{number}").as_bytes(),
            InodeKind::Fifo,
            mode(0o600),
        );
    }
    let mut deep = root;
    for level in 0..40 {
        deep = b.directory(deep, format!("level{level}").as_bytes());
    }
    let bottom = b.noise(5000);
    b.file(deep, b"bottom", 0, &bottom);

    let slots = [0, 1].map(|number: usize| {
        let blocks = u64::try_from(b.devices[number].len() / 512).unwrap();
        DeviceSlot {
            tag: [b'0' + u8::try_from(number).unwrap(); 64],
            blocks,
        }
    });
    let tree = write_tree(&b.tree, &slots).unwrap();
    let counted = links(&b.tree);
    b.expect(root, b"", &|id| counted(id));
    for (source, bytes) in b.sources.iter().zip(&b.devices) {
        std::fs::write(source, bytes).unwrap();
    }
    Image {
        tree,
        devices: b.devices,
        expected: b.expected,
    }
}

/// Link counts, counted: of a directory 2 and its subdirectories, else the names.
fn links(tree: &Tree) -> impl Fn(InodeId) -> u64 + use<> {
    let mut counts = std::collections::BTreeMap::new();
    let mut todo = vec![tree.root()];
    counts.insert(tree.root(), 2);
    while let Some(directory) = todo.pop() {
        for &child in tree.children(directory).values() {
            if tree.inode(child).is_directory() {
                *counts.entry(directory).or_insert(2) += 1;
                counts.entry(child).or_insert(2);
                todo.push(child);
            } else {
                *counts.entry(child).or_insert(0) += 1;
            }
        }
    }
    move |id| counts[&id]
}
