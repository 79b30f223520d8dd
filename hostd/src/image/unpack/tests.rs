//! What a layer may do and what it may not. As root: layers have owners and whiteouts.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use proptest::prelude::*;
use tar::{EntryType, Header};
use tempfile::TempDir;

use super::*;

/// A layer that is being written; each call adds an entry.
#[derive(Default)]
struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    /// Names go into the header as they are, however bad.
    fn entry(mut self, kind: EntryType, mode: u32, path: &str, link: &str, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(mode);
        header.set_uid(12);
        header.set_gid(34);
        header.set_mtime(1_000_000);
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, data: &str) -> Self {
        self.entry(EntryType::Regular, 0o644, path, "", data.as_bytes())
    }

    fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, 0o755, path, "", b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, 0o777, path, target, b"")
    }

    fn link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, 0o644, path, target, b"")
    }

    fn pax(self, key: &str, value: &[u8]) -> Self {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = body.len() + 1;
        while length != body.len() + length.to_string().len() {
            length = body.len() + length.to_string().len();
        }
        let record = [length.to_string().as_bytes(), &body].concat();
        self.entry(EntryType::XHeader, 0o644, "pax", "", &record)
    }

    fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }

    fn unpack(self) -> Result<Layer, ImageError> {
        let bytes = self.finish();
        let dir = TempDir::new().unwrap();
        let implicit = unpack(&bytes[..], dir.path(), &Digest::of(&bytes))?;
        Ok(Layer { dir, implicit })
    }
}

struct Layer {
    dir: TempDir,
    implicit: Vec<PathBuf>,
}

impl Layer {
    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }

    fn is_whiteout(&self, path: &str) -> bool {
        let metadata = self.at(path).symlink_metadata();
        metadata.is_ok_and(|found| found.file_type().is_char_device() && found.rdev() == 0)
    }

    fn attribute(&self, path: &str, name: &str) -> Option<Vec<u8>> {
        let mut value = [0; 256];
        let length = rustix::fs::lgetxattr(self.at(path), name, &mut value[..]).ok()?;
        Some(value[..length].to_vec())
    }

    fn is_opaque(&self, path: &str) -> bool {
        self.attribute(path, "trusted.overlay.opaque")
            .is_some_and(|value| value == b"y")
    }
}

/// Refused layers: the entry at fault and a part of the reason.
fn refused_names() -> Vec<(Tar, String, &'static str)> {
    let deep = "d/".repeat(tree::DEPTH_MAX + 1);
    let pax = |path: &str| Tar::default().pax("path", path.as_bytes()).file("x", "");
    let case = |tar: Tar, entry: &str, reason| (tar, entry.to_owned(), reason);
    vec![
        case(Tar::default().file("../evil", "x"), "../evil", "`..`"),
        case(Tar::default().file("a/../../b", "x"), "a/../../b", "`..`"),
        case(Tar::default().dir("a/.."), "a/..", "`..`"),
        case(Tar::default().symlink("..", "/etc"), "..", "`..`"),
        case(Tar::default().file(".wh...", ""), ".wh...", "whiteout"),
        case(Tar::default().file(".wh..", ""), ".wh..", "whiteout"),
        case(Tar::default().file("d/.wh.", ""), "d/.wh.", "whiteout"),
        case(Tar::default().link("/", "f"), "/", "root"),
        case(Tar::default().symlink("/", "/etc"), "/", "root"),
        case(
            Tar::default().file("f", "x").file("f/g", "y"),
            "f/g",
            "not a directory",
        ),
        case(pax(&deep), &deep, "deep"),
        case(pax(&"n".repeat(300)), &"n".repeat(300), "too long"),
        case(pax(&"n/".repeat(3000)), &"n/".repeat(3000), "4096"),
    ]
}

/// The same, for what entries lead to and carry.
fn refused_contents() -> Vec<(Tar, String, &'static str)> {
    let case = |tar: Tar, entry: &str, reason| (tar, entry.to_owned(), reason);
    let maze = Tar::default().symlink("a", "b").symlink("b", "a");
    vec![
        case(Tar::default().link("p", "/etc/passwd"), "p", "absolute"),
        case(Tar::default().link("p", "../../etc/passwd"), "p", "`..`"),
        case(
            Tar::default().link("p", "etc/passwd"),
            "p",
            "not in the layer",
        ),
        case(
            Tar::default().symlink("a", "/etc").link("p", "a/passwd"),
            "p",
            "not in the layer",
        ),
        case(
            Tar::default().dir("d").link("e", "d"),
            "e",
            "is a directory",
        ),
        case(maze.file("a/f", ""), "a/f", "links"),
        case(Tar::default().symlink("a", ""), "a", "target is empty"),
        case(
            Tar::default().pax("uid", b"4294967295").file("f", ""),
            "f",
            "user id",
        ),
        case(
            Tar::default().pax("gid", b"99999999999").file("f", ""),
            "f",
            "group id",
        ),
        case(
            Tar::default()
                .pax("SCHILY.xattr.security.capability", b"junk")
                .file("f", ""),
            "f",
            "security.capability",
        ),
    ]
}

#[test]
fn a_layer_that_breaks_a_rule_is_refused_with_the_entry_and_the_reason() {
    for (tar, expected_entry, expected_reason) in
        refused_names().into_iter().chain(refused_contents())
    {
        match tar.unpack().map(|layer| layer.dir.path().to_owned()) {
            Err(ImageError::Refused { entry, reason, .. }) => {
                assert_eq!(entry, expected_entry, "{reason}");
                assert!(reason.contains(expected_reason), "{entry}: {reason}");
            }
            other => panic!("{expected_entry}: {other:?}"),
        }
    }
}

#[test]
fn a_symlink_to_the_hosts_etc_leads_to_the_layers_etc() {
    let host = fs::read("/etc/passwd").unwrap();
    let layer = Tar::default()
        .symlink("a", "/etc")
        .file("a/passwd", "inside")
        .symlink("up", "../../../..")
        .file("up/etc/group", "inside")
        .symlink("loop/self", ".")
        .file("loop/self/self/f", "inside")
        .unpack()
        .unwrap();
    assert_eq!(layer.read("etc/passwd"), "inside");
    assert_eq!(layer.read("etc/group"), "inside");
    assert_eq!(layer.read("loop/f"), "inside");
    // The text of the link is the image's business.
    assert_eq!(fs::read_link(layer.at("a")).unwrap(), Path::new("/etc"));
    assert_eq!(fs::read("/etc/passwd").unwrap(), host);
}

#[test]
fn writing_over_a_symlink_replaces_the_link_and_not_its_target() {
    let outside = TempDir::new().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "safe").unwrap();
    let target = victim.to_str().unwrap();
    let layer = Tar::default()
        .symlink("f", target)
        .file("f", "new")
        .symlink("d", target)
        .dir("d")
        .unpack();
    let layer = layer.unwrap();
    assert_eq!(layer.read("f"), "new");
    assert!(layer.at("d").symlink_metadata().unwrap().is_dir());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "safe");
}

#[test]
fn leading_slashes_and_dots_of_names_mean_the_layers_root() {
    let layer = Tar::default()
        .dir("./")
        .file("/etc/a", "a")
        .file("./etc/b", "b")
        .unpack()
        .unwrap();
    assert_eq!(
        (layer.read("etc/a"), layer.read("etc/b")),
        ("a".to_owned(), "b".to_owned())
    );
}

#[test]
fn attributes_are_those_of_the_archive() {
    // Version 2, effective, cap_net_bind_service.
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let layer = Tar::default()
        .entry(EntryType::Directory, 0o2775, "mail", "", b"")
        .entry(EntryType::Regular, 0o4755, "mail/su", "", b"x")
        .pax("SCHILY.xattr.security.capability", capability)
        .file("ping", "x")
        .pax("SCHILY.xattr.user.note", b"kept")
        .pax("mtime", b"1234567890.5")
        .file("note", "x")
        .entry(EntryType::Fifo, 0o622, "pipe", "", b"")
        .symlink("link", "ping")
        .unpack()
        .unwrap();
    for (path, mode) in [("mail", 0o42775), ("mail/su", 0o104_755), ("pipe", 0o10622)] {
        let metadata = layer.at(path).symlink_metadata().unwrap();
        assert_eq!(metadata.permissions().mode(), mode, "{path}");
        assert_eq!((metadata.uid(), metadata.gid()), (12, 34), "{path}");
        assert_eq!(metadata.mtime(), 1_000_000, "{path}");
    }
    let link = layer.at("link").symlink_metadata().unwrap();
    assert_eq!((link.uid(), link.mtime()), (12, 1_000_000));
    assert_eq!(
        layer.attribute("ping", "security.capability").unwrap(),
        capability
    );
    // The PAX header before this one does not speak of it.
    assert_eq!(layer.attribute("note", "user.note"), None);
    let note = layer.at("note").metadata().unwrap();
    assert_eq!(
        (note.mtime(), note.mtime_nsec()),
        (1_234_567_890, 500_000_000)
    );
}

#[test]
fn attributes_that_would_steer_the_host_are_dropped() {
    for name in [
        "trusted.overlay.redirect",
        "user.overlay.redirect",
        "security.selinux",
    ] {
        let layer = Tar::default()
            .pax(&format!("SCHILY.xattr.{name}"), b"/etc")
            .file("f", "");
        assert_eq!(layer.unpack().unwrap().attribute("f", name), None, "{name}");
    }
    let kept = Tar::default()
        .pax("SCHILY.xattr.user.kept", b"value")
        .file("f", "")
        .unpack();
    assert_eq!(kept.unwrap().attribute("f", "user.kept").unwrap(), b"value");
}

#[test]
fn device_nodes_are_left_out() {
    let layer = Tar::default()
        .entry(EntryType::Char, 0o666, "dev/null", "", b"")
        .entry(EntryType::Block, 0o666, "dev/sda", "", b"")
        .unpack()
        .unwrap();
    assert_eq!(fs::read_dir(layer.at("dev")).unwrap().count(), 0);
}

#[test]
fn whiteouts_become_those_of_overlayfs() {
    let layer = Tar::default()
        .dir("etc")
        .file("etc/.wh.gone", "")
        .file("var/.wh..wh..opq", "")
        .file(".wh..wh.plnk/1.2", "")
        .unpack()
        .unwrap();
    assert!(layer.is_whiteout("etc/gone"));
    assert!(layer.is_opaque("var"));
    assert!(!layer.is_opaque("etc"));
    let names: Vec<_> = fs::read_dir(layer.at("etc")).unwrap().collect();
    assert_eq!(names.len(), 1);
}

#[test]
fn what_a_layer_has_itself_is_not_hidden_by_its_own_whiteout() {
    // In either order, as the order of entries in a layer means nothing.
    let before = Tar::default()
        .file(".wh.f", "")
        .file("f", "new")
        .file(".wh.d", "")
        .file("d/x", "x");
    let after = Tar::default()
        .file("f", "new")
        .file(".wh.f", "")
        .file("d/x", "x")
        .file(".wh.d", "");
    for tar in [before, after] {
        let layer = tar.unpack().unwrap();
        assert_eq!(layer.read("f"), "new");
        assert_eq!(layer.read("d/x"), "x");
        assert!(
            layer.is_opaque("d"),
            "what the layers below have in it stays hidden"
        );
    }
}

#[test]
fn hard_links_share_an_inode_also_with_a_symlink_or_after_replacement() {
    let layer = Tar::default()
        .file("bin/a", "one")
        .link("bin/b", "bin/a")
        .link("bin/b", "./bin/a")
        .symlink("s", "bin/a")
        .link("t", "s")
        .symlink("usr", "bin")
        .link("c", "usr/a")
        .unpack()
        .unwrap();
    let inode = |path: &str| layer.at(path).symlink_metadata().unwrap().ino();
    assert_eq!(inode("bin/a"), inode("bin/b"));
    assert_eq!(inode("bin/a"), inode("c"));
    assert_eq!(inode("s"), inode("t"));
    assert!(layer.at("t").is_symlink());
}

#[test]
fn a_later_entry_replaces_an_earlier_one_of_another_kind() {
    let layer = Tar::default()
        .file("a/b/c", "x")
        .file("a", "file")
        .dir("a")
        .file("a/d", "y")
        .symlink("a", "elsewhere")
        .file("a/e", "z")
        .unpack()
        .unwrap();
    assert!(layer.at("a").is_symlink());
    assert_eq!(layer.read("elsewhere/e"), "z");
}

#[test]
fn a_sparse_file_has_its_holes_and_its_whole_size() {
    let mut header = Header::new_gnu();
    header.set_path("s").unwrap();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_size(3);
    header.set_mode(0o644);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.set_real_size(50_000_000);
    gnu.sparse[0].set_offset(40_000_000);
    gnu.sparse[0].set_length(3);
    header.set_cksum();
    let mut tar = Tar::default();
    tar.bytes.extend_from_slice(header.as_bytes());
    tar.bytes.extend_from_slice(b"abc");
    tar.bytes.resize(1024, 0);
    let layer = tar.file("next", "x").unpack().unwrap();
    let metadata = layer.at("s").metadata().unwrap();
    assert_eq!(metadata.len(), 50_000_000);
    assert!(
        metadata.blocks() * 512 < 1_000_000,
        "the holes take no space"
    );
    assert_eq!(
        &fs::read(layer.at("s")).unwrap()[40_000_000..40_000_003],
        b"abc"
    );
    assert_eq!(layer.read("next"), "x");
}

#[test]
fn a_sparse_file_counts_as_large_as_it_looks() {
    let mut header = Header::new_gnu();
    header.set_path("s").unwrap();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_size(0);
    header.set_mode(0o644);
    header
        .as_gnu_mut()
        .unwrap()
        .set_real_size(LAYER_BYTES_MAX + 1);
    header.set_cksum();
    let mut tar = Tar::default();
    tar.bytes.extend_from_slice(header.as_bytes());
    let result = tar.unpack().map(|layer| layer.dir.path().to_owned());
    assert!(
        matches!(result, Err(ImageError::Refused { .. })),
        "{result:?}"
    );
}

#[test]
fn a_wrong_diff_id_is_told_with_both_digests() {
    let bytes = Tar::default().file("f", "x").finish();
    let dir = TempDir::new().unwrap();
    let wrong = Digest::of(b"other");
    match unpack(&bytes[..], dir.path(), &wrong) {
        Err(ImageError::DigestMismatch { expected, actual }) => {
            assert_eq!(expected, wrong.to_string());
            assert_eq!(actual, Digest::of(&bytes).to_string());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_directory_that_a_layer_does_not_describe_looks_as_below() {
    let sticky = |tar: Tar| tar.entry(EntryType::Directory, 0o1777, "tmp", "", b"");
    let bottom = sticky(Tar::default()).dir("gone").unpack().unwrap();
    let middle = Tar::default().file(".wh.gone", "").unpack().unwrap();
    let top = Tar::default()
        .file("tmp/f", "x")
        .file("gone/f", "x")
        .file("new/f", "x");
    let top = top.unpack().unwrap();
    let names: Vec<_> = top
        .implicit
        .iter()
        .map(|path| path.as_os_str().as_bytes())
        .collect();
    assert_eq!(names, [&b""[..], b"gone", b"new", b"tmp"]);

    let below = [middle.dir.path(), bottom.dir.path()];
    settle(top.dir.path(), &top.implicit, below.into_iter()).unwrap();
    for (path, mode, owner, time) in [
        ("tmp", 0o41777, 12, 1_000_000),
        // A whiteout is between it and the one below.
        ("gone", 0o40755, 0, 0),
        ("new", 0o40755, 0, 0),
    ] {
        let metadata = top.at(path).metadata().unwrap();
        assert_eq!(metadata.permissions().mode(), mode, "{path}");
        assert_eq!((metadata.uid(), metadata.mtime()), (owner, time), "{path}");
    }
}

/// Short names out of few, so that entries meet: links to parents, to the root and to each other.
fn any_entry() -> impl Strategy<Value = (u8, String, String, u8)> {
    let name = prop::sample::select(vec!["a", "b", "c", "..", ".", ".wh.a", ".wh..wh..opq"]);
    let path = prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"));
    let targets = vec![
        "/",
        "..",
        "../..",
        "a",
        "b/c",
        "../b",
        "/a/b",
        "/proc/self/root",
        "/etc",
    ];
    (
        0..6_u8,
        path,
        prop::sample::select(targets).prop_map(str::to_owned),
        any::<u8>(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_sequence_of_entries_leaves_the_directory(
        entries in prop::collection::vec(any_entry(), 1..12)
    ) {
        let outer = TempDir::new().unwrap();
        let root = outer.path().join("one/two/root");
        fs::create_dir_all(&root).unwrap();
        let mut tar = Tar::default();
        for (kind, path, target, _) in &entries {
            tar = match kind {
                0 | 1 => tar.file(path, "x"),
                2 => tar.dir(path),
                3 | 4 => tar.symlink(path, target),
                _ => tar.link(path, target.trim_start_matches('/')),
            };
        }
        let bytes = tar.finish();
        let _either = unpack(&bytes[..], &root, &Digest::of(&bytes));
        for (directory, only) in [("", "one"), ("one", "two"), ("one/two", "root")] {
            let names: Vec<_> = fs::read_dir(outer.path().join(directory))
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            prop_assert_eq!(names, [only]);
        }
    }

    #[test]
    fn no_damage_to_a_layer_makes_it_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        keep in any::<prop::sample::Index>(),
    ) {
        let mut bytes = Tar::default()
            .pax("SCHILY.xattr.user.a", b"b")
            .file("a/b", "data")
            .symlink("s", "a")
            .link("c", "a/b")
            .finish();
        for (index, byte) in flips {
            let position = index.index(bytes.len());
            bytes[position] = byte;
        }
        bytes.truncate(keep.index(bytes.len()));
        let dir = TempDir::new().unwrap();
        let _either = unpack(&bytes[..], dir.path(), &Digest::of(b""));
    }
}
