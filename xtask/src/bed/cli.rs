//! `cargo xtask bed`: the bed by hand.
//!
//! `run` gives the program's output on standard output and its exit status as its own, so that it can stand
//! in a script; everything the bed itself has to say goes to standard error.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};

use super::qemu::Qemu;
use super::{Bed, Guest, Kernel, ResolveError, ResolvedKernel, cache, diff, kernel, vmm};

/// The exit status when the bed, rather than the program in it, failed; as of env(1) and its like.
const BED_FAILED: i32 = 125;

/// The arguments of `cargo xtask bed`.
#[derive(Parser)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch or build QEMU and kernels into the cache.
    Fetch {
        /// Kernels by name; all when none is named.
        kernels: Vec<String>,
    },
    /// Show what is in the cache.
    List,
    /// Boot a kernel, run a program there, and exit with its status.
    Run(Run),
    /// Boot and restore a Linux guest under QEMU, with and without the library, and count its faults.
    Qemu(vmm::Cli),
    /// Put random operations to the library and to real kernels, which must agree.
    Diff(diff::Cli),
}

#[derive(Args)]
struct Run {
    /// A kernel of the bed: 6.1, 6.12, newest or private.
    #[arg(long, default_value = "newest", value_name = "NAME")]
    kernel_name: String,
    /// A kernel image of your own instead.
    #[arg(long, value_name = "IMAGE", conflicts_with = "kernel_name")]
    kernel: Option<PathBuf>,
    /// Where its modules are; without it they are taken to be built in.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// The guest's memory in MiB.
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    memory: u64,
    /// The guest's CPUs.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Seconds that booting and running may take.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// A file to take in, with its libraries if it is a program.
    #[arg(long = "file", value_name = "HOST:INSIDE")]
    files: Vec<String>,
    /// A directory to look for shared libraries in, before the system's.
    #[arg(long = "library-dir", value_name = "DIR")]
    library_dirs: Vec<PathBuf>,
    /// An environment variable for the program.
    #[arg(long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// More for the kernel's command line.
    #[arg(long = "kernel-arg", value_name = "ARG")]
    kernel_args: Vec<String>,
    /// Show the kernel's log afterwards, on standard error.
    #[arg(long)]
    show_kernel_log: bool,
    /// A program of this machine, taken in under the same path; or one inside the guest, such as busybox's.
    #[arg(required = true, last = true, value_name = "PROGRAM ARGS")]
    argv: Vec<String>,
}

/// Carries out a `bed` command.
pub fn main(cli: Cli) -> Result<()> {
    let bed = Bed::open()?;
    let (done, failure) = match cli.command {
        Command::Fetch { kernels } => (fetch(&bed, &kernels).map(|()| 0), 1),
        Command::List => (list(&bed).map(|()| 0), 1),
        Command::Run(arguments) => (run(&bed, &arguments), BED_FAILED),
        Command::Qemu(arguments) => (vmm::main(&bed, &arguments).map(|()| 0), 1),
        Command::Diff(arguments) => (diff::main(&bed, &arguments).map(|()| 0), 1),
    };
    // Not left to the caller: a person wants the reason, not where in this program it came up.
    let status = done.unwrap_or_else(|error| {
        eprintln!("Error: {error:#}");
        failure
    });
    std::process::exit(status)
}

fn fetch(bed: &Bed, names: &[String]) -> Result<()> {
    let kernels = match names {
        [] => Kernel::all(),
        names => names.iter().map(|name| Kernel::named(name)).collect::<Result<_>>()?,
    };
    let mut missing = Vec::new();
    for kernel in &kernels {
        match bed.resolve(kernel) {
            Ok(_) => {}
            Err(ResolveError::Unavailable(reason)) => {
                eprintln!("bed: kernel {} cannot be had here: {reason}", kernel.name());
                missing.push(kernel.name());
            }
            Err(error) => return Err(error).with_context(|| format!("kernel {}", kernel.name())),
        }
    }
    list(bed)?;
    if !missing.is_empty() {
        bail!("not to be had here: {}", missing.join(", "));
    }
    Ok(())
}

fn list(bed: &Bed) -> Result<()> {
    let row = |name: &str, version: &str, size: &str| println!("{name:<8} {version:<22} {size:>9}");
    let mib = |dir: &Path| format!("{:.1} MiB", cache::size(dir) as f64 / f64::from(1 << 20));
    match Qemu::cached(&bed.cache)? {
        Some(qemu) => row("qemu", &qemu.version()?, &mib(qemu.dir())),
        None => row("qemu", "not fetched", ""),
    }
    for kernel in Kernel::all() {
        match kernel::cached(&kernel, &bed.cache)? {
            Some((resolved, dir)) => row(&resolved.name, &resolved.version, &mib(&dir)),
            None => row(&kernel.name(), "not fetched", ""),
        }
    }
    Ok(())
}

fn run(bed: &Bed, arguments: &Run) -> Result<i32> {
    let kernel = resolve(bed, arguments)?;
    let guest = guest(arguments)?;
    let outcome = super::run(bed, &kernel, &guest, &mut |line| {
        // Whoever reads this may have seen enough; the status still counts.
        let _ = writeln!(std::io::stdout(), "{line}");
    })?;
    if arguments.show_kernel_log {
        eprintln!("{}", outcome.kernel_log.trim_end());
    }
    if let Some(line) = &outcome.oops {
        eprintln!("bed: the kernel reported trouble while the program ran: {line}");
        if !arguments.show_kernel_log {
            eprintln!("bed: --show-kernel-log shows all of it");
        }
    }
    eprintln!(
        "bed: Linux {}, booted in {:.1} s, ran {:.1} s, {} bytes of output, exit status {}",
        kernel.version,
        outcome.boot.as_secs_f64(),
        outcome.ran.as_secs_f64(),
        outcome.output.len(),
        outcome.status
    );
    Ok(outcome.status)
}

fn resolve(bed: &Bed, arguments: &Run) -> Result<ResolvedKernel> {
    let kernel = match &arguments.kernel {
        Some(image) => Kernel::Own { image: image.clone(), modules: arguments.modules.clone() },
        None => Kernel::named(&arguments.kernel_name)?,
    };
    Ok(bed.resolve(&kernel)?)
}

fn guest(arguments: &Run) -> Result<Guest> {
    let mut guest = Guest {
        memory_mib: arguments.memory,
        cpus: arguments.cpus,
        timeout: Duration::from_secs(arguments.timeout),
        kernel_args: arguments.kernel_args.clone(),
        ..Guest::new(arguments.argv.clone())
    };
    let dirs: Vec<&Path> = arguments.library_dirs.iter().map(PathBuf::as_path).collect();
    for (host, inside) in pairs(&arguments.files, ':', "--file HOST:INSIDE")? {
        guest.add(Path::new(&host), &inside, &dirs)?;
    }
    guest.env = pairs(&arguments.env, '=', "--env NAME=VALUE")?;
    if let Some(program) = guest.argv.first().cloned().filter(|program| program.contains('/')) {
        let (host, inside) = (Path::new(&program), std::path::absolute(&program)?);
        let taken = guest.files.iter().any(|(_, inside)| *inside == program);
        if !taken && host.is_file() {
            let inside = inside.to_string_lossy().into_owned();
            guest.add(host, &inside, &dirs)?;
            guest.argv[0] = inside;
        }
    }
    Ok(guest)
}

/// Splits each of `texts` at the first `separator`.
fn pairs(texts: &[String], separator: char, usage: &str) -> Result<Vec<(String, String)>> {
    let split = |text: &String| -> Result<(String, String)> {
        let (left, right) = text.split_once(separator).with_context(|| format!("{text:?} is not {usage}"))?;
        Ok((left.to_string(), right.to_string()))
    };
    texts.iter().map(split).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_split_at_the_first_separator() {
        let split = pairs(&["A=b=c".to_string()], '=', "--env").unwrap();
        assert_eq!(split, [("A".to_string(), "b=c".to_string())]);
        assert!(
            pairs(&["A".to_string()], '=', "--env NAME=VALUE").unwrap_err().to_string().contains("--env")
        );
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
