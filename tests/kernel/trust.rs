//! Access to the pins: only root can replace, open or lock them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use lb_userspace::datapath::{Datapath, unload};
use rustix::fs::{FlockOperation, flock};

use crate::fixture::{Place, Server, VIP, connect, service, table};
use crate::pins::programs;

const FLAG: &str = "--lock";
/// The locking process ends, and another one keeps its descriptor.
const FORK: &str = "--fork";
const UNPRIVILEGED: u32 = 65534;

/// An unprivileged process that has locked a directory, until it is dropped.
struct Locker(Child);

impl Locker {
    fn start(dir: &Path, options: &[&str]) -> Locker {
        use std::io::Read;
        use std::os::unix::process::CommandExt;
        let mut child = Command::new("/proc/self/exe")
            .arg(FLAG)
            .arg(dir)
            .args(options)
            .uid(UNPRIVILEGED)
            .gid(UNPRIVILEGED)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Locker(child)
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
        // The process that continues in its place closes this when it ends.
        let _ = self.0.stdout.as_mut().map(|end| std::io::Read::read(end, &mut [0]));
    }
}

/// Locks a directory until stdin ends, if this process was started for that.
#[expect(clippy::zombie_processes, reason = "this process ends, and cat continues in its place")]
pub fn hidden_command() -> Option<ExitCode> {
    use std::io::{Read, Write};
    let mut arguments = std::env::args().skip(1);
    if arguments.next()? != FLAG {
        return None;
    }
    let dir = fs::File::open(arguments.next()?).unwrap();
    flock(&dir, FlockOperation::LockExclusive).unwrap();
    if arguments.next().as_deref() == Some(FORK) {
        // cat has this process's stdin and stdout, and by its stderr the lock.
        Command::new("cat").stderr(dir).spawn().unwrap();
        std::io::stdout().write_all(&[0]).unwrap();
        std::io::stdout().flush().unwrap();
        return Some(ExitCode::SUCCESS);
    }
    std::io::stdout().write_all(&[0]).unwrap();
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    Some(ExitCode::SUCCESS)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The daemon works in a directory that is in the given state.
fn assert_serves(place: &Place) {
    let server = Server::start(b'a');
    let mut datapath = Datapath::start(&place.options).unwrap();
    datapath.keep();
    datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    for dir in ["", "v3", "v3/maps", "v3/links", "sockets"] {
        assert_eq!(mode(&place.pin(dir)), 0o700, "{dir:?}");
    }
    datapath.detach();
}

/// An earlier version, or an operator, left the directory open.
pub fn an_open_directory_is_closed() {
    let place = Place::new();
    drop(place.start());
    set_mode(&place.options.bpffs, 0o755);
    assert_serves(&place);
}

/// A process of another user opened the directory while that was possible, and locks it. That it ends
/// and leaves the lock to another one, and takes the names that a directory may get, changes nothing.
pub fn a_lock_of_another_user_is_no_daemons() {
    for (options, taken) in
        [(&[][..], None), (&[FORK], None), (&[], Some("nohop-aside")), (&[], Some("nohop-aside-1"))]
    {
        let place = Place::new();
        let (server, mut datapath) = (Server::start(b'a'), place.start());
        datapath.apply(&table(vec![service("web", VIP, &[(server.address, 1)])])).unwrap();
        let before = datapath.indices("web");
        datapath.keep();
        drop(datapath);
        let bpffs = place.options.bpffs.clone();
        set_mode(bpffs.parent().unwrap(), 0o1777);
        set_mode(&bpffs, 0o755);
        let taken = taken.map(|name| bpffs.with_file_name(name));
        if let Some(taken) = &taken {
            fs::create_dir_all(taken.join("theirs")).unwrap();
            chown(taken, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
        }
        let mut locker = Locker::start(&bpffs, options);
        if options == [FORK] {
            let stdin = locker.0.stdin.take();
            assert!(locker.0.wait().unwrap().success());
            locker.0.stdin = stdin;
        }
        let mut datapath = Datapath::start(&place.options)
            .unwrap_or_else(|error| panic!("{options:?}, {taken:?}: {error}"));
        datapath.keep();
        assert!(datapath.is_adopted(), "the pins have moved along");
        assert_eq!(datapath.indices("web"), before);
        assert_eq!(connect((VIP, 80)).unwrap(), 'a');
        assert!(datapath.fix().is_complete());
        let siblings = fs::read_dir(bpffs.parent().unwrap()).unwrap();
        let names = siblings.map(|entry| entry.unwrap().path());
        let left: Vec<_> = names
            .filter(|path| {
                path.to_str().unwrap().contains("-aside") && Some(path) != taken.as_ref()
            })
            .collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(taken.is_none_or(|taken| taken.join("theirs").exists()));
        datapath.detach();
    }
}

/// Another user's link of the file system has the name: it is moved aside, wherever it leads.
pub fn a_symlink_of_another_user_is_moved_aside() {
    let place = Place::new();
    let bpffs = &place.options.bpffs;
    set_mode(bpffs.parent().unwrap(), 0o1777);
    let on_bpffs = bpffs.with_file_name("theirs");
    fs::create_dir(&on_bpffs).unwrap();
    for (n, target) in [(1, Path::new("/proc")), (2, Path::new("/nowhere")), (3, &on_bpffs)] {
        std::os::unix::fs::symlink(target, bpffs).unwrap();
        std::os::unix::fs::lchown(bpffs, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
        assert_serves(&place);
        let aside = bpffs.with_file_name(format!("nohop-of-uid-{UNPRIVILEGED}-{n}"));
        assert_eq!(fs::read_link(&aside).unwrap(), target);
    }
}

/// A process of root's that is no daemon holds the lock: it is named.
pub fn a_lock_is_named() {
    let place = Place::new();
    drop(place.start());
    let bpffs = &place.options.bpffs;
    let mut holder = Command::new("flock")
        .arg(bpffs)
        .args(["sh", "-c", "echo; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let error = Datapath::start(&place.options).unwrap_err().to_string();
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let expected = format!("process {} (flock, of uid 0) has locked", holder.id());
    assert!(error.contains(&expected), "{error}");
}

/// Another user made the directory first: it is moved aside, with what is in it.
pub fn a_directory_of_another_user_is_moved_aside() {
    let place = Place::new();
    let bpffs = &place.options.bpffs;
    for n in 1..=2 {
        fs::create_dir_all(bpffs.join("v3/links")).unwrap();
        fs::create_dir(bpffs.join("precious")).unwrap();
        chown(bpffs, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
        assert_serves(&place);
        let aside = bpffs.with_file_name(format!("nohop-of-uid-{UNPRIVILEGED}-{n}"));
        assert!(aside.join("precious").exists());
        assert_eq!(fs::metadata(&aside).unwrap().uid(), UNPRIVILEGED);
    }
}

/// An unsafe directory is refused with the fix, and nothing changes.
pub fn what_isnt_safe_is_refused() {
    let mut place = Place::new();
    let mount = place.options.bpffs.parent().unwrap().to_owned();
    let above = mount.join("above");
    fs::create_dir(&above).unwrap();
    place.options.bpffs = above.join("nohop");
    for (uid, mode, expected) in [
        (
            UNPRIVILEGED,
            0o755,
            "is another user's (uid 65534), so others could take the pins; chown root",
        ),
        (0, 0o777, "may be written to by others (mode 777), so others could take the pins; chown"),
        (0, 0o775, "may be written to by others (mode 775)"),
    ] {
        chown(&above, Some(uid), None).unwrap();
        set_mode(&above, mode);
        let error = Datapath::start(&place.options).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("above"), "{error}");
        assert!(!place.options.bpffs.exists());
    }
    // The file system's root is for others, too: it isn't ours to close.
    place.options.bpffs = mount.clone();
    set_mode(&mount, 0o1777);
    let error = Datapath::start(&place.options).unwrap_err().to_string();
    assert!(error.contains("chmod 700") && error.contains("below it with --bpffs"), "{error}");
    assert_eq!(mode(&mount), 0o1777);
    set_mode(&mount, 0o700);
    fs::remove_dir(&above).unwrap();
    place.options.bpffs = mount.clone();
    drop(place.start());
    assert_eq!(unload(&mount).unwrap(), programs().len());
    // A link of the file system's may lead anywhere.
    place.options.bpffs = mount.join("elsewhere");
    std::os::unix::fs::symlink(&mount, &place.options.bpffs).unwrap();
    let error = Datapath::start(&place.options).unwrap_err().to_string();
    assert!(error.contains("is no directory"), "{error}");
}
