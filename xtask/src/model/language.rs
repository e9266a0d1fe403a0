//! The language of scenarios: one operation a line, as a person would say it.
//!
//! Here text becomes operations, and whatever is wrong with it is said with the number of its line and what could have stood
//! there. Whether an operation can be done, and what it answers, is found out by doing it, elsewhere.
//!
//! Addresses and sizes are numbers, decimal or with 0x, with K, M, G or T behind them, and sums of such: `1G+8K`. What
//! follows a `#` is for the reader. Behind `=>` stands the answer that is expected; without it, that is success.

use super::calls::Call;
use super::reader::{Words, nearest};
use anyhow::{Context, Result, anyhow, ensure};
use kvmprep_model::mmu::comparison::Zap;
use kvmprep_model::personality::{Version, VmType};
use kvmprep_model::units::{Level, Privacy};
use kvmprep_model::vm::Nested;

/// A line that says something.
#[derive(Clone, PartialEq, Debug)]
pub struct Line {
    pub number: usize,
    /// The operation as it is written, without comment and expectation.
    pub text: String,
    pub operation: Operation,
    pub expected: Option<String>,
}

/// Bytes of the guest's addresses.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Range {
    pub gpa: u64,
    pub size: u64,
}

/// A place in a memory or a file that has a name.
#[derive(Clone, PartialEq, Debug)]
pub struct Place {
    pub name: String,
    pub offset: u64,
}

/// A slot's number and address space, as the ioctl takes them.
pub type SlotNumber = u32;

#[derive(Clone, PartialEq, Debug)]
pub enum Operation {
    Title(String),
    Picture(String),
    Kernel(Version),
    Vm(VmType),
    Design(Design),
    Vcpu(u32),
    Memory { name: String, size: u64, kind: MemoryKind },
    File { name: String, size: u64, flags: u64 },
    Slot { slot: SlotNumber, at: Range, memory: Place, file: Option<Place>, flags: u32 },
    Move { slot: SlotNumber, gpa: u64 },
    Delete { slot: SlotNumber },
    Log { slot: SlotNumber, is_on: bool },
    DirtyLog { slot: SlotNumber },
    Attributes { range: Range, to: Privacy },
    Convert { range: Range, to: Privacy },
    Load { range: Range, is_measured: bool },
    Seal,
    PreFault { range: Range, vcpu: u32 },
    Guest { action: Action, gpa: u64, privacy: Option<Privacy>, vcpu: u32 },
    Run { vcpu: u32 },
    Forget { vcpu: u32 },
    Punch { file: Place, size: u64 },
    Allocate { file: Place, size: u64 },
    Close { file: String },
    Host { action: HostAction, memory: Place, size: u64 },
    Mode { mode: Mode, vcpu: u32 },
    Signal { vcpu: u32 },
    DisableQuirk,
    Fail { call: Call, nth: u64, how: Failure },
    Stop { call: Call, nth: u64 },
    GoOn,
    Zap { why: Zap, range: Range },
}

/// What is held against each other in the model's comparison of designs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Design {
    ByTable,
    /// The access decides; zaps, which have none, are taken for one of such pages.
    ByAccess(Privacy),
}

/// What a memory of the VMM's is.
#[derive(Clone, PartialEq, Debug)]
pub enum MemoryKind {
    Anonymous,
    Shared,
    Thp,
    Hugetlb(Level),
    File(String),
}

/// What a guest does.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Action {
    Read,
    Write,
    Fetch,
    Accept,
    GiveUp,
}

/// What the VMM does with its own memory.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum HostAction {
    Read,
    Write,
    Discard,
    Remove,
    PopulateRead,
    PopulateWrite,
    Collapse,
    Protect,
    Unprotect,
    Unmap,
    Poison,
}

/// What a vCPU can be in, or not.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Mode {
    Smm(bool),
    Nested(Option<Nested>),
}

/// How a call of the other side fails.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Failure {
    Busy,
    Refused,
}

/// Reads a scenario.
pub fn parse(text: &str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        let said = line.split('#').next().unwrap_or_default().trim();
        if !said.is_empty() {
            lines.push(parse_line(number, said).with_context(|| format!("line {number}: {said}"))?);
        }
    }
    ensure!(!lines.is_empty(), "nothing is said in it");
    Ok(lines)
}

fn parse_line(number: usize, said: &str) -> Result<Line> {
    let (text, expected) = match said.split_once("=>") {
        Some((text, expected)) => (text.trim(), Some(expected.trim().to_string())),
        None => (said, None),
    };
    ensure!(expected.as_deref() != Some(""), "what is expected is to stand behind =>");
    let operation = operation(text)?;
    let has_answer = !matches!(operation, Operation::Title(_) | Operation::Picture(_));
    ensure!(has_answer || expected.is_none(), "there is no answer to expect");
    Ok(Line { number, text: text.to_string(), operation, expected })
}

/// Every operation: how it is written, and how it is read.
const OPERATIONS: &[(&str, &str, Parser)] = &[
    ("title", "title TEXT", |words| Ok(Operation::Title(words.rest("a text")?))),
    ("picture", "picture TEXT", |words| Ok(Operation::Picture(words.rest("what it shows")?))),
    ("kernel", "kernel 6.1|6.12|…|7.3", |words| Ok(Operation::Kernel(words.version()?))),
    ("vm", "vm default|sw-protected|snp|tdx", |words| Ok(Operation::Vm(words.one_of("a type", TYPES)?))),
    ("design", "design by-table|by-access-zaps-shared|by-access-zaps-private", |words| {
        Ok(Operation::Design(words.one_of("a design", DESIGNS)?))
    }),
    ("vcpu", "vcpu NUMBER", |words| Ok(Operation::Vcpu(words.small_number("its number")?))),
    ("memory", "memory NAME SIZE [shared|thp|hugetlb-2M|hugetlb-1G|file NAME]", memory),
    ("file", "file NAME SIZE [mmap] [init-shared]", file),
    (
        "slot",
        "slot NUMBER ADDRESS SIZE memory NAME[+OFFSET] [file NAME[+OFFSET]] [read-only] [log] [smm]",
        slot,
    ),
    ("move", "move NUMBER ADDRESS [smm]", |words| {
        let (slot, gpa) = (words.slot()?, words.size("an address")?);
        Ok(Operation::Move { slot: words.in_smm(slot), gpa })
    }),
    ("delete", "delete NUMBER [smm]", |words| {
        let slot = words.slot()?;
        Ok(Operation::Delete { slot: words.in_smm(slot) })
    }),
    ("log", "log NUMBER on|off [smm]", |words| {
        let (slot, is_on) = (words.slot()?, words.switch()?);
        Ok(Operation::Log { slot: words.in_smm(slot), is_on })
    }),
    ("dirty-log", "dirty-log NUMBER [smm]", |words| {
        let slot = words.slot()?;
        Ok(Operation::DirtyLog { slot: words.in_smm(slot) })
    }),
    ("attributes", "attributes ADDRESS SIZE private|shared", |words| {
        Ok(Operation::Attributes { range: words.range()?, to: words.one_of("what it becomes", PRIVACIES)? })
    }),
    ("convert", "convert ADDRESS SIZE private|shared", |words| {
        Ok(Operation::Convert { range: words.range()?, to: words.one_of("what it becomes", PRIVACIES)? })
    }),
    ("load", "load ADDRESS SIZE [unmeasured]", |words| {
        Ok(Operation::Load { range: words.range()?, is_measured: !words.has("unmeasured") })
    }),
    ("seal", "seal", |_| Ok(Operation::Seal)),
    ("pre-fault", "pre-fault ADDRESS SIZE [vcpu NUMBER]", |words| {
        Ok(Operation::PreFault { range: words.range()?, vcpu: words.vcpu()? })
    }),
    ("guest", "guest read|write|fetch|accept|give-up ADDRESS [shared|private] [vcpu NUMBER]", guest),
    ("run", "run [vcpu NUMBER]", |words| Ok(Operation::Run { vcpu: words.vcpu()? })),
    ("forget", "forget [vcpu NUMBER]", |words| Ok(Operation::Forget { vcpu: words.vcpu()? })),
    ("punch", "punch FILE[+OFFSET] SIZE", |words| {
        Ok(Operation::Punch { file: words.place("a file")?, size: words.size("a size")? })
    }),
    ("allocate", "allocate FILE[+OFFSET] SIZE", |words| {
        Ok(Operation::Allocate { file: words.place("a file")?, size: words.size("a size")? })
    }),
    ("close", "close FILE", |words| Ok(Operation::Close { file: words.word("a file")?.to_string() })),
    (
        "host",
        "host read|write|discard|remove|populate-read|populate-write|collapse|protect|unprotect|unmap|poison \
         MEMORY[+OFFSET] SIZE",
        |words| {
            let action = words.one_of("what the VMM does", HOST_ACTIONS)?;
            Ok(Operation::Host { action, memory: words.place("a memory")?, size: words.size("a size")? })
        },
    ),
    ("smm", "smm on|off [vcpu NUMBER]", |words| {
        Ok(Operation::Mode { mode: Mode::Smm(words.switch()?), vcpu: words.vcpu()? })
    }),
    ("nested", "nested with-tables|without-tables|off [vcpu NUMBER]", |words| {
        let nested = words.one_of("a nested guest", NESTED)?;
        Ok(Operation::Mode { mode: Mode::Nested(nested), vcpu: words.vcpu()? })
    }),
    ("signal", "signal [vcpu NUMBER]", |words| Ok(Operation::Signal { vcpu: words.vcpu()? })),
    ("quirk", "quirk slot-zap-all off", |words| {
        words.one_of("a quirk", &[("slot-zap-all", ())])?;
        words.one_of("what can be done with it", &[("off", ())])?;
        Ok(Operation::DisableQuirk)
    }),
    ("fail", "fail CALL NTH busy|refused", |words| {
        let call = words.call()?;
        let nth = words.nth()?;
        Ok(Operation::Fail { call, nth, how: words.one_of("how", FAILURES)? })
    }),
    ("stop", "stop CALL [NTH]", |words| {
        let call = words.call()?;
        Ok(Operation::Stop { call, nth: if words.is_over() { 1 } else { words.nth()? } })
    }),
    ("go-on", "go-on", |_| Ok(Operation::GoOn)),
    ("zap", "zap guest-memfd|notifier ADDRESS SIZE", |words| {
        let why =
            words.one_of("what zaps", &[("guest-memfd", Zap::GuestMemfd), ("notifier", Zap::Notifier)])?;
        Ok(Operation::Zap { why, range: words.range()? })
    }),
];

type Parser = fn(&mut Words<'_>) -> Result<Operation>;

const TYPES: &[(&str, VmType)] = &[
    ("default", VmType::Default),
    ("sw-protected", VmType::SwProtected),
    ("snp", VmType::Snp),
    ("tdx", VmType::Tdx),
];

const DESIGNS: &[(&str, Design)] = &[
    ("by-table", Design::ByTable),
    ("by-access-zaps-shared", Design::ByAccess(Privacy::Shared)),
    ("by-access-zaps-private", Design::ByAccess(Privacy::Private)),
];

const PRIVACIES: &[(&str, Privacy)] = &[("private", Privacy::Private), ("shared", Privacy::Shared)];

const FAILURES: &[(&str, Failure)] = &[("busy", Failure::Busy), ("refused", Failure::Refused)];

const ACTIONS: &[(&str, Action)] = &[
    ("read", Action::Read),
    ("write", Action::Write),
    ("fetch", Action::Fetch),
    ("accept", Action::Accept),
    ("give-up", Action::GiveUp),
];

const NESTED: &[(&str, Option<Nested>)] = &[
    ("with-tables", Some(Nested::WithTables)),
    ("without-tables", Some(Nested::WithoutTables)),
    ("off", None),
];

const HOST_ACTIONS: &[(&str, HostAction)] = &[
    ("read", HostAction::Read),
    ("write", HostAction::Write),
    ("discard", HostAction::Discard),
    ("remove", HostAction::Remove),
    ("populate-read", HostAction::PopulateRead),
    ("populate-write", HostAction::PopulateWrite),
    ("collapse", HostAction::Collapse),
    ("protect", HostAction::Protect),
    ("unprotect", HostAction::Unprotect),
    ("unmap", HostAction::Unmap),
    ("poison", HostAction::Poison),
];

/// How every operation is written, and what they have in common.
pub fn usage() -> String {
    let operations: String = OPERATIONS.iter().map(|(_, usage, _)| format!("{usage}\n")).collect();
    let calls: Vec<_> = Call::ALL.iter().map(|call| call.name()).collect();
    format!(
        "{operations}\nADDRESS, SIZE, OFFSET: 0x1000, 4K, 1G+8K\nCALL: {}\n\
         OPERATION => ANSWER: what it is to answer, if not success\n# a comment\n",
        calls.join(", ")
    )
}

fn operation(text: &str) -> Result<Operation> {
    let name = text.split_whitespace().next().unwrap_or_default();
    let (_, usage, parser) = OPERATIONS.iter().find(|(known, _, _)| *known == name).with_context(|| {
        format!("there is no operation {name:?}{}", nearest(name, OPERATIONS.iter().map(|known| known.0)))
    })?;
    let mut words = Words::of(&text[name.len()..]);
    let parsed = parser(&mut words).and_then(|operation| words.end().map(|()| operation));
    parsed.map_err(|error| anyhow!("{error:#}; it is written: {usage}"))
}

fn memory(words: &mut Words<'_>) -> Result<Operation> {
    let (name, size) = (words.name()?, words.size("a size")?);
    let kind = if words.has("shared") {
        MemoryKind::Shared
    } else if words.has("thp") {
        MemoryKind::Thp
    } else if words.has("hugetlb-2M") {
        MemoryKind::Hugetlb(Level::HUGE)
    } else if words.has("hugetlb-1G") {
        MemoryKind::Hugetlb(Level::GIGANTIC)
    } else if words.has("file") {
        MemoryKind::File(words.word("a file")?.to_string())
    } else {
        MemoryKind::Anonymous
    };
    Ok(Operation::Memory { name, size, kind })
}

fn file(words: &mut Words<'_>) -> Result<Operation> {
    use kvmprep_model::gmem::{FLAG_INIT_SHARED, FLAG_MMAP};
    let (name, size) = (words.name()?, words.size("a size")?);
    let flags = words.flags(&[("mmap", FLAG_MMAP), ("init-shared", FLAG_INIT_SHARED)]);
    Ok(Operation::File { name, size, flags })
}

fn slot(words: &mut Words<'_>) -> Result<Operation> {
    use kvmprep_model::memslot::{GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY};
    let (slot, at) = (words.slot()?, words.range()?);
    ensure!(words.has("memory"), "its memory is missing");
    let memory = words.place("a memory")?;
    let file = if words.has("file") { Some(words.place("a file")?) } else { None };
    let mut flags = if file.is_some() { GUEST_MEMFD } else { 0 };
    flags |= words.flags(&[("read-only", READONLY.into()), ("log", LOG_DIRTY_PAGES.into())]) as u32;
    Ok(Operation::Slot { slot: words.in_smm(slot), at, memory, file, flags })
}

fn guest(words: &mut Words<'_>) -> Result<Operation> {
    let action = words.one_of("what the guest does", ACTIONS)?;
    let gpa = words.size("an address")?;
    let privacy = PRIVACIES.iter().find(|(name, _)| words.has(name)).map(|(_, privacy)| *privacy);
    Ok(Operation::Guest { action, gpa, privacy, vcpu: words.vcpu()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Operation {
        parse(text).unwrap_or_else(|error| panic!("{error:#}")).remove(0).operation
    }

    fn complaint(text: &str) -> String {
        format!("{:#}", parse(text).expect_err("it was taken"))
    }

    #[test]
    fn comments_and_empty_lines_are_for_the_reader() {
        let lines = parse("# what this is\n\n  vm tdx   # a TD\nseal => EINVAL").unwrap();
        let seen: Vec<_> = lines.iter().map(|line| (line.number, line.text.as_str())).collect();
        assert_eq!(seen, [(3, "vm tdx"), (4, "seal")]);
        assert_eq!(lines[1].expected.as_deref(), Some("EINVAL"));
        assert_eq!(lines[0].expected, None);
    }

    #[test]
    fn slots_have_memory_and_perhaps_a_file() {
        let range = Range { gpa: 1 << 30, size: 65536 };
        let place = |name: &str, offset| Place { name: name.into(), offset };
        assert_eq!(
            one("slot 3 1G 64K memory ram+4K file secret log smm"),
            Operation::Slot {
                slot: 3 | 1 << 16,
                at: range,
                memory: place("ram", 4096),
                file: Some(place("secret", 0)),
                flags: 5,
            }
        );
    }

    #[test]
    fn what_may_be_left_out_may_be() {
        assert_eq!(one("stop TDH.MEM.TRACK"), one("stop TDH.MEM.TRACK 1"));
        assert_eq!(one("run"), one("run vcpu 0"));
        let range = Range { gpa: 0, size: 4096 };
        assert_eq!(one("pre-fault 0 4K vcpu 2"), Operation::PreFault { range, vcpu: 2 });
    }

    #[test]
    fn every_operation_is_read_as_its_usage_says_and_no_word_more() {
        let examples = "title A title\npicture A caption\nkernel 6.12\nvm snp\ndesign by-table\nvcpu 1\n\
                        memory ram 1M thp\nfile f 1M mmap\nslot 0 1G 1M memory ram\nmove 0 2G\ndelete 0 smm\n\
                        log 0 on\ndirty-log 0\nattributes 1G 4K private\nconvert 1G 4K shared\n\
                        load 1G 4K unmeasured\nseal\npre-fault 1G 4K\nguest write 1G private vcpu 1\nrun\n\
                        forget\npunch f+4K 4K\nallocate f 4K\nclose f\nhost discard ram 4K\nsmm on\n\
                        nested off\nsignal\nquirk slot-zap-all off\nfail TDH.MEM.PAGE.AUG 2 busy\n\
                        stop TDH.MEM.TRACK\ngo-on\nzap notifier 0 4K";
        let lines = parse(examples).unwrap_or_else(|error| panic!("{error:#}"));
        let names = |line: &Line| line.text.split(' ').next().unwrap_or_default().to_string();
        let tried: Vec<String> = lines.iter().map(names).collect();
        let known: Vec<&str> = OPERATIONS.iter().map(|known| known.0).collect();
        assert_eq!(tried, known);
        for line in lines.iter().skip(2) {
            assert!(complaint(&format!("{} more", line.text)).contains("more"), "{}", line.text);
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line_and_what_is_right() {
        let wrong = [
            ("vm tdx\nslto 0", "line 2: slto 0: there is no operation \"slto\", but \"slot\""),
            ("vm tdz", "\"tdz\" is not a type, but \"tdx\"; it is written: vm default|sw-protected|snp|tdx"),
            ("pre-fault 1G", "a size is missing; it is written: pre-fault ADDRESS SIZE"),
            ("pre-fault 1G 4k", "\"4k\" is not a size (0x1000, 4K, 1G+8K)"),
            ("seal now", "\"now\" is one word too many"),
            ("stop TDH.MEM.PAGE.AGU", "there is no call \"TDH.MEM.PAGE.AGU\", but \"TDH.MEM.PAGE.AUG\""),
            ("stop TDH.MEM.TRACK 0", "calls are counted from 1"),
            ("memory 4K 4K", "\"4K\" is no name"),
            ("slot 0 1G 4K file f", "its memory is missing"),
            ("kernel 5.10", "no kernel before 6.1"),
            ("seal =>", "what is expected is to stand behind =>"),
            ("title Two words => 0", "there is no answer to expect"),
            ("# nothing", "nothing is said in it"),
        ];
        for (text, told) in wrong {
            let complaint = complaint(text);
            assert!(complaint.contains(told), "{text}: {complaint}");
        }
    }
}
