//! Boots a guest under emulation and sees it through to its end.
//!
//! A run ends with the program's own exit status or with an error that says why there is none: a panic, a
//! hang, a QEMU that died. It must never take one for the other, and never leave a QEMU behind.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::guest::Guest;
use super::kernel::ResolvedKernel;
use super::process::tail;
use super::qemu::Qemu;
use super::stream::Stream;
use super::{initramfs, kernel_log};

/// How much of a log an error quotes.
const QUOTED_LINES: usize = 30;

/// How a guest that ran its program ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The program's exit status; 128 and the signal's number when a signal ended it.
    pub status: i32,
    /// Its standard output and standard error, in the order they came.
    pub output: String,
    /// The kernel's log, from boot to power-off.
    pub kernel_log: String,
    /// The first line in which the kernel reported trouble of its own (an oops, a warning) while the program
    /// ran.
    pub oops: Option<String>,
    /// From starting QEMU to starting the program.
    pub boot: Duration,
    /// From starting the program to its end.
    pub ran: Duration,
}

/// Boots `guest` on `kernel` and hands the program's output to `on_line` as it comes.
pub fn run(
    qemu: &Qemu,
    keeper: &Path,
    kernel: &ResolvedKernel,
    guest: &Guest,
    on_line: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    check(guest)?;
    let dir = tempfile::tempdir()?;
    let token = format!("{:016x}", RandomState::new().build_hasher().finish());
    let initrd = dir.path().join("initrd");
    initramfs::write(&initrd, guest, &kernel.modules, [&qemu.busybox(), keeper], &token)?;
    let mut running = Running::start(command(qemu, kernel, guest, dir.path()), guest.timeout)?;
    let mut stream = Stream::new(&token);
    let end = running.watch(&mut stream, on_line)?;
    let kernel_log = read_lossy(&dir.path().join("kernel.log")).replace('\r', "");
    let qemu_said = read_lossy(&dir.path().join("qemu.log"));
    match (end, stream.status(), running.started) {
        (End::Exited, Some(status), Some(started)) => Ok(Outcome {
            status,
            output: stream.output(),
            oops: kernel_log::trouble(&kernel_log, guest.known_warnings)
                .or(kernel_log::panic(&kernel_log))
                .map(str::to_string),
            boot: started - running.began,
            ran: running.ended.unwrap_or_else(Instant::now) - started,
            kernel_log,
        }),
        (end, ..) => Err(explain(kernel, guest, end, &stream, &kernel_log, &qemu_said)),
    }
}

/// Refuses what would fail late or silently.
fn check(guest: &Guest) -> Result<()> {
    if guest.argv.is_empty() {
        bail!("no program was given to run in the guest");
    }
    if let Some((name, _)) = guest.env.iter().find(|(name, _)| !is_variable_name(name)) {
        bail!("{name:?} is no name for an environment variable");
    }
    if guest.argv.iter().chain(guest.env.iter().map(|(_, value)| value)).any(|text| text.contains('\0')) {
        bail!("an argument or environment variable holds a NUL byte");
    }
    if guest.cpus == 0 || guest.memory_mib < 64 {
        bail!("a guest needs a CPU and at least 64 MiB");
    }
    Ok(())
}

fn is_variable_name(name: &str) -> bool {
    let word = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    word && !name.is_empty() && !name.starts_with(|first: char| first.is_ascii_digit())
}

fn command(qemu: &Qemu, kernel: &ResolvedKernel, guest: &Guest, dir: &Path) -> Result<Command> {
    let mut command = qemu.command();
    // "max" has SVM with nested paging, which is all the bed is about.
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-nodefaults", "-no-reboot"]);
    command.args(["-display", "none", "-monitor", "none"]);
    command.args(["-smp", &guest.cpus.to_string(), "-m", &format!("{}M", guest.memory_mib)]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(dir.join("initrd"));
    // A panic reboots at once, which -no-reboot turns into QEMU's end.
    let mut line = vec!["console=ttyS0", "panic=-1", "loglevel=7"];
    line.extend(guest.kernel_args.iter().map(String::as_str));
    command.arg("-append").arg(line.join(" "));
    // Names in the current directory need no escaping of commas.
    command.current_dir(dir);
    command.args(["-chardev", "file,id=log,path=kernel.log", "-serial", "chardev:log"]);
    command.args(["-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(dir.join("qemu.log"))?);
    Ok(command)
}

/// How a run came to its end.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exited,
    TimedOut,
}

/// A QEMU at work, killed when dropped.
struct Running {
    child: Child,
    chunks: Receiver<Vec<u8>>,
    timeout: Duration,
    began: Instant,
    started: Option<Instant>,
    ended: Option<Instant>,
}

impl Running {
    fn start(command: Result<Command>, timeout: Duration) -> Result<Self> {
        let began = Instant::now();
        let mut child = command?.spawn().context("cannot start QEMU")?;
        let (sender, chunks) = mpsc::channel();
        let stdout = child.stdout.take().context("QEMU has no standard output")?;
        // Ends by itself when QEMU does.
        std::thread::spawn(move || forward(stdout, &sender));
        Ok(Running { child, chunks, timeout, began, started: None, ended: None })
    }

    /// Reads until QEMU ends or the time is up.
    fn watch(&mut self, stream: &mut Stream, on_line: &mut dyn FnMut(&str)) -> Result<End> {
        let deadline = self.began + self.timeout;
        loop {
            match self.chunks.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(chunk) => stream.feed(&chunk, on_line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => return Ok(End::TimedOut),
            }
            if stream.started() {
                self.started.get_or_insert_with(Instant::now);
            }
            if stream.status().is_some() {
                self.ended.get_or_insert_with(Instant::now);
            }
        }
        self.child.wait()?;
        Ok(End::Exited)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail harmlessly for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn forward(mut from: impl Read, to: &mpsc::Sender<Vec<u8>>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.send(buffer[..count].to_vec()).is_err() {
            return;
        }
    }
}

/// Why a run has no exit status.
fn explain(
    kernel: &ResolvedKernel,
    guest: &Guest,
    end: End,
    stream: &Stream,
    kernel_log: &str,
    qemu_said: &str,
) -> anyhow::Error {
    let stage = match (stream.started(), stream.status()) {
        (false, _) => "before the program started".to_string(),
        (true, None) => format!("while {} ran", guest.argv.first().map_or("the program", String::as_str)),
        (true, Some(status)) => format!("at power-off, after the program had ended with status {status}"),
    };
    let what = if let Some(line) = kernel_log::panic(kernel_log) {
        format!("the kernel panicked {stage}: {line}")
    } else if let Some(line) = kernel_log::init_failure(kernel_log) {
        format!("the guest could not be set up: {line}")
    } else if end == End::TimedOut {
        let seconds = guest.timeout.as_secs_f64();
        format!("not done after {seconds} s, time ran out {stage}; allow more time, or see where it hangs")
    } else if kernel_log.is_empty() && end == End::Exited {
        let memory = guest.memory_mib;
        format!(
            "it went off without a word; it may need more memory than {memory} MiB, or lack a serial console"
        )
    } else {
        format!("the emulated machine went off {stage}")
    };
    let mut text = format!("kernel {} ({}): {what}", kernel.name, kernel.version);
    let output = stream.output();
    for (title, said) in [
        ("QEMU said", qemu_said),
        ("the program's last output", &output),
        ("the end of the kernel's log", kernel_log),
    ] {
        if !said.trim().is_empty() {
            text.push_str(&format!("\n--- {title}:\n{}", tail(said, QUOTED_LINES)));
        }
    }
    anyhow!(text)
}

fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_cannot_work_is_refused() {
        assert!(check(&Guest::new(["true"])).is_ok());
        assert!(check(&Guest::new(Vec::<String>::new())).is_err());
        assert!(check(&Guest { memory_mib: 1, ..Guest::new(["true"]) }).is_err());
        assert!(check(&Guest { env: vec![("A B".into(), "".into())], ..Guest::new(["true"]) }).is_err());
        assert!(check(&Guest::new(["a\0b"])).is_err());
    }

    #[test]
    fn an_error_names_the_stage_and_quotes_the_log() {
        let kernel = ResolvedKernel {
            name: "6.12".into(),
            version: "6.12.57".into(),
            image: "unused".into(),
            modules: Vec::new(),
        };
        let guest = Guest::new(["/bin/prog"]);
        let mut stream = Stream::new("T");
        let told =
            |stream: &Stream, end, log: &str| explain(&kernel, &guest, end, stream, log, "").to_string();
        let text = told(&stream, End::TimedOut, "[0.1] line\n");
        assert!(text.contains("time ran out before the program started"), "{text}");
        assert!(text.ends_with("log:\n[0.1] line"), "{text}");
        stream.feed(b"T start\nhalf", &mut |_| {});
        let text = told(&stream, End::Exited, "Kernel panic - not syncing: x\n");
        assert!(text.contains("6.12.57): the kernel panicked while /bin/prog ran"), "{text}");
        assert!(text.contains("output:\nhalf"), "{text}");
    }
}
