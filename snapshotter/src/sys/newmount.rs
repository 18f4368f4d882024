// SPDX-License-Identifier: Apache-2.0
//! Mounting an EROFS tree from files, by descriptors: mount(2) takes one page of options, which ends
//! before the names of 127 devices do.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

/// Longest value of a string option, the zero at its end included.
///
/// **Source** fs/fsopen.c, `SYSCALL_DEFINE5(fsconfig`.
const VALUE_BYTES: usize = 256;

/// Who keeps the bytes of devices in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// The file system of the devices, and EROFS for its files.
    Both,
    /// EROFS alone: devices are read past their file system's own pages. From Linux 6.15.
    Once,
}

/// Mounts the tree at `mountpoint`, read-only; device `i` of the tree is `devices[i - 1]`.
///
/// The kernel opens the files itself and keeps them open as long as the file system lives: what is
/// deleted meanwhile stays readable through it. It opens them anew, so what they are marked with when
/// this is called counts, not how `devices` were opened.
///
/// **Errors** those of the kernel, with what it says about them: no EROFS, none from files (before
/// Linux 6.12), a tree that it does not take.
pub fn erofs(tree: &Path, devices: &[File], mountpoint: &Path, caching: Caching) -> io::Result<()> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("open"))?;
    let configured = configure(&context, tree, devices, caching);
    configured.map_err(|error| explained(&context, error))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(|error| explained(&context, error.into()))?;
    let from_descriptor = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount.as_fd(), "", CWD, mountpoint, from_descriptor).map_err(step("attach"))
}

fn step(what: &'static str) -> impl Fn(rustix::io::Errno) -> io::Error {
    move |error| {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("{what} EROFS: {error}"))
    }
}

fn configure(context: &OwnedFd, tree: &Path, devices: &[File], caching: Caching) -> io::Result<()> {
    if tree.as_os_str().len() >= VALUE_BYTES {
        let what = format!("the tree's path has more than {} bytes", VALUE_BYTES - 1);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    fsconfig_set_string(context, "source", tree)?;
    for device in devices {
        // By descriptor: a device's own path may be too long for an option.
        let path = format!("/proc/self/fd/{}", device.as_raw_fd());
        fsconfig_set_string(context, "device", path)?;
    }
    if caching == Caching::Once {
        fsconfig_set_flag(context, "directio")?;
    }
    fsconfig_create(context)?;
    Ok(())
}

/// With the last thing that the kernel said about it.
fn explained(context: &OwnedFd, error: io::Error) -> io::Error {
    let mut said = None;
    if let Ok(context) = context.try_clone() {
        let (mut context, mut message) = (File::from(context), [0; 512]);
        while let Ok(length @ 1..) = context.read(&mut message) {
            said = Some(
                String::from_utf8_lossy(&message[..length])
                    .trim()
                    .to_owned(),
            );
        }
    }
    let said = said.map_or_else(String::new, |said| format!(" ({said})"));
    io::Error::new(error.kind(), format!("mount EROFS: {error}{said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_tree_is_refused_with_the_kernels_words() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: not root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::write(&tree, vec![7; 8192]).unwrap();
        let error = erofs(&tree, &[], dir.path(), Caching::Both)
            .unwrap_err()
            .to_string();
        assert!(error.contains("EROFS"), "{error}");
        let long = dir.path().join("x".repeat(250));
        let error = erofs(&long, &[], dir.path(), Caching::Both)
            .unwrap_err()
            .to_string();
        println!("{error}");
        assert!(
            crate::sys::mountpoint::mount_at(dir.path())
                .unwrap()
                .is_none()
        );
    }
}
