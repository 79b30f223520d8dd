//! The same image as a container sees it (overlayfs over the layers), as a virtual machine sees it
//! (the disk), and as umoci unpacks it: three ways to one tree.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hostd::image::{Disk, ImageStore};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use crate::fixture::{Image, Layer, Packing, Store, names, run, sha256, unheard};

/// All that an instance can see of a file but its time.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    links: Option<u64>,
    content: Option<String>,
    time: Option<i64>,
}

fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut ahead = vec![root.to_owned()];
    while let Some(path) = ahead.pop() {
        let metadata = path.symlink_metadata().unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_file() {
            Some(sha256(&fs::read(&path).unwrap()))
        } else if kind.is_symlink() {
            Some(fs::read_link(&path).unwrap().display().to_string())
        } else {
            None
        };
        if kind.is_dir() {
            ahead.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        let name = path.strip_prefix(root).unwrap().to_owned();
        // Links of directories are counted differently by each file system, and the times of
        // directories that no layer describes are nobody's.
        let known = !kind.is_dir();
        let entry = Seen {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            links: known.then(|| metadata.nlink()),
            content,
            time: known.then(|| metadata.mtime()),
        };
        seen.insert(name, entry);
    }
    seen
}

/// Runs `look` where mounts are nobody else's and end with it.
fn in_mount_namespace<T: Send + 'static>(look: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).expect("needs root");
        let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
        look()
    });
    thread.join().unwrap()
}

/// Takes a mount away at once: a child that another thread forks has copies of this process's descriptors until
/// it executes its program, and with one of a directory in the mount the kernel would call it busy.
fn detach(target: &Path) {
    umount2(target, MntFlags::MNT_DETACH).unwrap();
}

fn overlay(layers: &[PathBuf]) -> BTreeMap<PathBuf, Seen> {
    let layers = layers.to_owned();
    in_mount_namespace(move || {
        let target = TempDir::new().unwrap();
        let lower: Vec<_> = layers
            .iter()
            .rev()
            .map(|path| path.display().to_string())
            .collect();
        let options = format!("lowerdir={}", lower.join(":"));
        let flags = MsFlags::MS_RDONLY;
        mount(
            Some("overlay"),
            target.path(),
            Some("overlay"),
            flags,
            Some(&*options),
        )
        .unwrap();
        let seen = tree(target.path());
        detach(target.path());
        seen
    })
}

fn mounted(disk: &Disk) -> BTreeMap<PathBuf, Seen> {
    let disk = disk.clone();
    in_mount_namespace(move || {
        let target = TempDir::new().unwrap();
        let (file, point) = (disk.path.to_str().unwrap(), target.path().to_str().unwrap());
        run(
            "mount",
            "mount",
            &["-t", disk.fs, "-o", "loop,ro", file, point],
        );
        let seen = tree(target.path());
        detach(target.path());
        seen
    })
}

#[tokio::test]
async fn a_container_and_a_machine_see_the_tree_that_umoci_unpacks() {
    let work = TempDir::new().unwrap();
    let layout = work.path().join("layout");
    Image::demo(Packing::Gzip).write_layout(&layout, "demo");
    let store = Store::new();
    let image = store
        .store
        .import(&layout, Some("demo:1"), unheard())
        .await
        .unwrap();
    let layers = store.store.unpacked(&image.digest).unwrap().layers;
    let disk = store.store.disk(&image.digest).await.unwrap();

    let bundle = work.path().join("bundle");
    let from = format!("{}:demo", layout.display());
    run(
        "umoci",
        "umoci",
        &["unpack", "--image", &from, bundle.to_str().unwrap()],
    );
    let expected = tree(&bundle.join("rootfs"));

    let container = overlay(&layers);
    assert_eq!(container, expected);
    assert_eq!(mounted(&disk), expected);
    // The tree is not trivially equal: the second layer has changed the first.
    assert!(!container.contains_key(Path::new("etc/gone")));
    assert!(!container.contains_key(Path::new("var/cache/old")));
    assert_eq!(container[Path::new("tmp")].mode, 0o41777);
    assert_eq!(container[Path::new("usr/bin/ping")].mode, 0o104_755);
    assert_eq!(container[Path::new("bin/su")].links, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_made_once_and_depends_on_the_image_alone() {
    let image = Image::demo(Packing::Zstd);
    let mut disks = Vec::new();
    // A file system of another kind hands out names in another order.
    for place in ["/dev/shm", "/var/tmp"] {
        let work = TempDir::new_in(place).unwrap();
        image.write_layout(&work.path().join("layout"), "demo:1");
        let store = ImageStore::open(&work.path().join("store")).unwrap();
        let imported = store
            .import(&work.path().join("layout"), None, unheard())
            .await
            .unwrap();
        let (one, two) = tokio::join!(store.disk(&imported.digest), store.disk(&imported.digest));
        let (one, two) = (one.unwrap(), two.unwrap());
        assert_eq!(one, two);
        assert_eq!(one.fs, "erofs");
        assert_eq!(names(&work.path().join("store/tmp")), [""; 0]);
        disks.push(fs::read(one.path).unwrap());
    }
    assert!(
        disks[0] == disks[1],
        "two hosts made different disks of one image"
    );
}

#[tokio::test]
async fn an_image_of_no_layer_and_one_of_as_many_as_there_may_be_have_disks_too() {
    let file = |index: usize| Layer::default().file(&format!("file{index}"), 0o644, b"x");
    let layers: Vec<Layer> = (0..127).map(file).collect();
    for count in [0, 1, 127] {
        let work = TempDir::new().unwrap();
        Image::new(&layers[..count], Packing::Plain, "amd64").write_layout(work.path(), "few:1");
        let store = Store::new();
        let image = store
            .store
            .import(work.path(), None, unheard())
            .await
            .unwrap();
        let disk = store.store.disk(&image.digest).await.unwrap();
        let seen = mounted(&disk);
        assert_eq!(seen.len(), 1 + count);
        assert!((0..count).all(|index| seen.contains_key(Path::new(&format!("file{index}")))));
    }
}
