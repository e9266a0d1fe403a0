//! Scenarios played: what they come to, and what is said of those that cannot be.

use super::player::{Film, Picture, Progress};
use super::view::{CellKind, Link, View};
use super::{drawing, film, words};

const PRIVATE: &str = "vm tdx\nmemory ram 32K\nfile secret 32K\nslot 0 1G 32K memory ram file secret\n\
                       attributes 1G 32K private\nload 1G 8K\nseal\n";

fn played(text: &str) -> Film {
    film(text).unwrap_or_else(|error| panic!("{error:#}"))
}

fn complaint(text: &str) -> String {
    format!("{:#}", film(text).err().expect("it was played to the end"))
}

fn last(film: &Film) -> &Picture {
    film.pictures.last().expect("there is a picture")
}

/// Address, and how both sides stand to each other, of the pages.
fn links(picture: &Picture) -> Vec<(String, Link)> {
    let rows = View::of(picture).pair.expect("there is a mirror").rows;
    let pages = rows.into_iter().filter(|row| row.mirror.kind != CellKind::Table);
    pages.map(|row| (row.place.address, row.link)).collect()
}

fn under_way(call: &str, takes_away: bool) -> Link {
    Link::UnderWay { call: call.into(), takes_away }
}

#[test]
fn a_stopped_operation_is_seen_in_its_middle_and_comes_to_its_end() {
    let film = played(&format!(
        "{PRIVATE}stop TDH.MEM.PAGE.AUG\npre-fault 1G+8K 4K\npicture a\ngo-on\nstop TDH.MEM.TRACK\n\
         punch secret 4K\npicture b\ngo-on\npicture c"
    ));
    let same = |address: &str| (address.to_string(), Link::Equal);
    let add = ("0x40002000".to_string(), under_way("TDH.MEM.PAGE.AUG", false));
    let take = ("0x40000000".to_string(), under_way("TDH.MEM.TRACK", true));
    assert_eq!(links(&film.pictures[0]), [same("0x40000000"), same("0x40001000"), add]);
    assert_eq!(links(&film.pictures[1]), [take, same("0x40001000"), same("0x40002000")]);
    assert_eq!(links(&film.pictures[2]), [same("0x40001000"), same("0x40002000")]);
    assert!(film.pictures[2].under_way.is_empty());
}

#[test]
fn who_waits_for_a_stopped_one_is_said_to_and_goes_on_with_it() {
    let film = played(&format!(
        "{}\nstop TDH.MEM.PAGE.AUG\npre-fault 1G+8K 4K\npre-fault 1G+12K 4K vcpu 1\n\
         pre-fault 1G+8K 4K vcpu 1\npicture a\ngo-on",
        PRIVATE.replace("vm tdx", "vm tdx\nvcpu 1")
    ));
    let [with, at_the_end] = &film.pictures[..] else { panic!("{} pictures", film.pictures.len()) };
    let progress: Vec<_> = with.under_way.iter().map(|under_way| under_way.progress).collect();
    assert!(matches!(progress[..], [Progress::Stopped(_), Progress::Waits]), "{progress:?}");
    assert!(with.steps.iter().any(|step| step.text.contains("12K") && step.answer == "0"));
    assert_eq!(at_the_end.steps.len(), 3, "what was let go, and both answers");
}

#[test]
fn what_a_scenario_leaves_standing_is_let_go() {
    let film = played(&format!("{PRIVATE}stop TDH.MEM.PAGE.AUG\npre-fault 1G+8K 4K"));
    assert_eq!(last(&film).under_way.len(), 1);
    let film = played(&format!("{PRIVATE}picture a\nstop TDH.MEM.PAGE.AUG\npre-fault 1G+8K 4K"));
    assert_eq!(last(&film).under_way.len(), 1, "what came after the last picture is seen, too");
}

#[test]
fn the_design_that_was_not_chosen_is_seen_to_differ() {
    let design = |name| format!("design {name}\nguest write 28K private\nzap guest-memfd 28K 4K\n");
    assert_eq!(links(last(&played(&design("by-table")))), []);
    let stale = [("0x7000".to_string(), Link::Different)];
    assert_eq!(links(last(&played(&design("by-access-zaps-shared")))), stale);
}

#[test]
fn many_pages_beside_each_other_are_one_row() {
    let film = played(
        "vm default\nmemory ram 256K\nslot 0 1G 256K memory ram\nhost write ram 128K\npre-fault 1G 256K",
    );
    let view = View::of(last(&film));
    let pages: Vec<_> = view.columns[0].rows.iter().filter(|row| row.cell.kind == CellKind::Page).collect();
    let said: Vec<_> =
        pages.iter().map(|row| [&row.place.size, &row.cell.what, &row.cell.note, &row.frame]).collect();
    assert_eq!(said[0], ["128K", "32 frames", "RWX-D", "ram 0–31"]);
    assert_eq!(said[1], ["128K", "32 frames", "R-X--", "the zero page"]);
    assert_eq!(said.len(), 2);
}

/// Everything that can be done and is not in the scenarios of the documentation.
#[test]
fn every_operation_does_what_it_says() {
    let film = played(
        "kernel 7.3
         vm snp
         memory ram 64K
         file secret 64K
         slot 0 1G 64K memory ram file secret
         attributes 1G 64K private
         load 1G 8K
         load 1G+8K 4K unmeasured
         fail SNP_LAUNCH_UPDATE 1 refused
         load 1G+12K 4K => EIO
         pre-fault 1G 4K => EOPNOTSUPP
         seal
         guest read 1G private
         guest accept 1G+16K
         guest give-up 1G+16K
         close secret
         guest read 1G private => EFAULT
         forget
         picture snp

         vm default
         vcpu 1
         vcpu 1 => EEXIST
         memory big 4M hugetlb-2M
         memory anonymous 16K
         memory common 16K shared
         slot 0 2M 4M memory big log
         slot 1 1G 16K memory anonymous
         slot 2 1G+16K 16K memory common read-only
         slot 3 1G+8K 16K memory common => EEXIST
         slot 0 1G 8K memory common smm
         pre-fault 2M 4M
         guest write 2M+4K
         dirty-log 0 => 0 1 2
         guest write 2M+4K
         dirty-log 0 => 1
         log 0 off
         guest read 1G => done, 1 fault, reads 0
         guest write 1G+16K => MMIO at 0x40004000
         smm on vcpu 1
         guest write 1G vcpu 1
         smm off vcpu 1
         nested with-tables
         pre-fault 1G 4K => EOPNOTSUPP
         nested off
         nested without-tables vcpu 1
         pre-fault 1G 4K vcpu 1
         nested off vcpu 1
         smm on vcpu 1
         nested without-tables vcpu 1 => EINVAL
         smm off vcpu 1
         signal
         pre-fault 1G 4K => EINTR
         forget
         quirk slot-zap-all off
         move 1 3G
         guest fetch 3G
         delete 2
         delete 2 => EINVAL
         host write anonymous 16K
         host protect anonymous 16K
         guest write 3G => EFAULT
         forget
         host unprotect anonymous 16K
         host populate-write anonymous 16K
         pre-fault 3G 20K => 0, 4K left
         host read anonymous 16K
         host collapse anonymous 16K => EINVAL
         host poison anonymous+4K 4K
         host discard anonymous 16K
         host remove common 16K
         host populate-read common 16K
         host unmap anonymous 16K
         pre-fault 3G 4K => EFAULT
         picture default

         vm sw-protected
         file both 64K mmap
         memory mapped 64K file both
         slot 0 1G 64K memory mapped file both
         allocate both 64K
         convert 1G 8K private
         guest write 1G
         guest write 1G+8K
         convert 1G 4K shared
         punch both+8K 4K
         vcpu 1
         run vcpu 1",
    );
    let captions: Vec<_> = film.pictures.iter().map(|picture| picture.caption.as_str()).collect();
    assert_eq!(captions, ["snp", "default", ""]);
    let text = words::film(&film);
    for said in
        ["> load 1G+12K 4K -> EIO", "mirror root", "direct root of 4 levels, of SMM", "for all accesses"]
    {
        assert_eq!(text.contains(said), said != "mirror root", "{said}:\n{text}");
    }
}

#[test]
fn a_scenario_comes_out_the_same_each_time() {
    let text = format!("{PRIVATE}stop TDH.MEM.TRACK\npunch secret 8K\npicture a\ngo-on");
    assert_eq!(drawing::svg(&played(&text)), drawing::svg(&played(&text)));
}

#[test]
fn what_cannot_be_played_is_said_with_its_line() {
    let wrong = [
        ("seal", "line 1: seal: there is no virtual machine yet"),
        ("picture a", "line 1: picture a: there is nothing to see yet"),
        ("vm tdx\npre-fault 1G 4K vcpu 2", "line 2: pre-fault 1G 4K vcpu 2: there is no vCPU 2: `vcpu 2`"),
        ("vm tdx\nslot 0 1G 4K memory ram", "there is no memory \"ram\""),
        ("vm tdx\nmemory ram 4K\nslot 0 1G 4K memory ram file f", "there is no file \"f\""),
        ("vm tdx\nmemory ram 4K\nmemory ram 4K", "line 3: memory ram 4K: there is a memory \"ram\" already"),
        ("vm tdx\ndelete 3", "there has been no slot 3"),
        ("vm tdx\nload 1G 4K", "no slot has 0x40000000"),
        ("vm tdx\nkernel 6.12", "line 2: kernel 6.12: the kernel is that of the machine"),
        ("kernel 6.12\nvm tdx", "line 2: vm tdx: it answers \"EINVAL\"; if that is expected"),
        ("vm tdx\npre-fault 1G 4K => EFAULT", "it answers \"EOPNOTSUPP\", where \"EFAULT\" is expected"),
        ("vm tdx\npre-fault 1G 4K => EOPNOT", "where \"EOPNOT\" is expected"),
        ("vm tdx\nseal => EINVAL", "it answers \"0\", where \"EINVAL\" is expected"),
        ("vm tdx\ngo-on", "line 2: go-on: nothing has stopped"),
        ("vm tdx\nstop TDH.MEM.TRACK\nseal", "line 2: TDH.MEM.TRACK was not called so often"),
        ("vm tdx\nstop TDH.VP.INIT", "at that call there is nothing to see yet"),
        ("fail TDH.VP.INIT 1 busy\nvm tdx", "line 2: vm tdx: it answers \"EIO\""),
        (
            "vm tdx\nmemory ram 4K\nfile f 4K\nslot 0 1G 4K memory ram file f\nattributes 1G 4K private\n\
             stop TDH.MEM.PAGE.ADD\nload 1G 4K\nvcpu 1",
            "line 8: vcpu 1: it is to be made while nothing is under way",
        ),
        ("design by-table\nseal", "of a design only accesses"),
        ("vm tdx\nzap notifier 0 4K", "that is nothing for a virtual machine"),
    ];
    for (text, told) in wrong {
        let complaint = complaint(text);
        assert!(complaint.contains(told), "{text}: {complaint}");
    }
}
