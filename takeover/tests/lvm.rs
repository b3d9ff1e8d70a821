//! Volume groups, with stand-ins for LVM's programs: the kernels that these tests run on have no device mapper. What the
//! stand-ins check is that only the step's own devices are ever looked at.
#![allow(clippy::unwrap_used, reason = "a test's broken assumption is a panic with a line number")]

mod support;

use support::{Host, on_a_host_of_its_own, outcomes, quiet};
use varve_takeover::{Mode, Outcome};

const ID: &str = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa";
const OTHER_ID: &str = "bbbbbb-bbbb-bbbb-bbbb-bbbb-bbbb-bbbbbb";

/// State: `@DIR@/units/vg` holds the group's name, `active` is there while it is.
const VGS: &str = r#"#!/bin/sh
echo "$0 $*" >>@DIR@/lvm.log
case "$*" in
*filter=*@DEVICE@*) echo "  WARNING: a line that is no answer"; echo "  $(cat @DIR@/units/vg) @ID@" ;;
*filter=*) exit 5 ;;
*) [ ! -e @DIR@/units/twin ] || echo "  vg0 @OTHER@"; echo "  $(cat @DIR@/units/vg) @ID@" ;;
esac
"#;
const LVS: &str = r#"#!/bin/sh
echo "$0 $*" >>@DIR@/lvm.log
[ -e @DIR@/units/active ] && echo "  active" || echo
"#;
const VGCHANGE: &str = r#"#!/bin/sh
echo "$0 $*" >>@DIR@/lvm.log
case "$*" in
*filter=*@DEVICE@*"--activate y $(cat @DIR@/units/vg)") touch @DIR@/units/active ;;
*filter=*@DEVICE@*"--activate n $(cat @DIR@/units/vg)") rm -f @DIR@/units/active ;;
*) exit 5 ;;
esac
"#;
const VGIMPORTCLONE: &str = r#"#!/bin/sh
echo "$0 $*" >>@DIR@/lvm.log
[ "$1" = --basevgname ] && [ "$3" = @DEVICE@ ] && echo "$2" >@DIR@/units/vg
"#;
const PLAN: &str = r#"
version = 1
[[step]]
name = "vg"
kind = "lvm"
vg = "vg0"
[[step]]
name = "use"
kind = "command"
run = "echo {vg0} >/dev/null; [ -e @DIR@/units/active ]"
undo = []
"#;

#[test]
fn a_volume_group_is_activated_and_in_a_test_renamed_before() {
    on_a_host_of_its_own(|| {
        for (mode, name) in [(Mode::Live, "vg0".to_owned()), (Mode::Test, "varve-test-lvm-".to_owned())] {
            let host = Host::new("lvm");
            let device = host.device.path().display().to_string();
            for (tool, script) in [("vgs", VGS), ("lvs", LVS), ("vgchange", VGCHANGE), ("vgimportclone", VGIMPORTCLONE)]
            {
                let script = script.replace("@DEVICE@", &device).replace("@ID@", ID).replace("@OTHER@", OTHER_ID);
                host.tool(tool, &script);
            }
            let vg = host.scratch.join("units/vg");
            std::fs::write(&vg, "vg0\n").unwrap();
            std::fs::write(host.scratch.join("lvm.log"), "").unwrap();
            let before = host.seen();
            let report = host.runner(PLAN, mode).run(&mut quiet).unwrap();
            assert_eq!(report.outcome, Outcome::Done, "{report}");
            assert_eq!(outcomes(&report), ["vg done", "use done"]);
            assert!(std::fs::read_to_string(&vg).unwrap().starts_with(&name));
            let again = host.runner(PLAN, mode).resume(&mut quiet).unwrap();
            assert_eq!(outcomes(&again)[0], "vg in-place");
            host.undo(mode);
            host.assert_as(&before);

            // Another one of that name on this host: a takeover does not mix them up.
            std::fs::write(host.scratch.join("units/twin"), "").unwrap();
            if mode == Mode::Live {
                let report = host.runner(PLAN, mode).run(&mut quiet).unwrap();
                assert!(report.steps[0].detail.contains("another volume group of the name vg0"), "{report}");
                host.undo(mode);
            }
            std::fs::write(&vg, "other\n").unwrap();
            let report = host.runner(PLAN, mode).run(&mut quiet).unwrap();
            assert!(report.steps[0].detail.contains("hold no volume group vg0; there is other"), "{report}");
            host.undo(mode);
        }
    });
}
