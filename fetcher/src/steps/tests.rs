// SPDX-License-Identifier: Apache-2.0

use super::*;

const QUICK: StepKind = StepKind::new("quick", Duration::from_secs(1));
const SLOW: StepKind = StepKind::new("slow", Duration::from_secs(60));

fn after(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

#[test]
fn a_step_beyond_its_limit_is_told_of_once_and_gone_when_it_ends() {
    let steps = Steps::new();
    let quick = steps.enter(QUICK, "a reader", "bytes 0..5 of x");
    let slow = steps.enter(SLOW, "nobody", "y");
    assert_eq!(steps.look(after(0)), Look::default());
    assert_eq!(steps.stuck(after(0)), []);

    let look = steps.look(after(10));
    let [stuck] = &look.stuck[..] else {
        panic!("{look:?}")
    };
    assert_eq!(
        (&*stuck.step, &*stuck.whom, &*stuck.subject),
        ("quick", "a reader", "bytes 0..5 of x")
    );
    assert!(stuck.stands >= Duration::from_secs(9), "{stuck:?}");
    assert_eq!(steps.look(after(11)), Look::default(), "told once");
    assert_eq!((steps.found("quick"), steps.stuck_now("quick")), (1, 1));
    assert_eq!((steps.found("slow"), steps.stuck_now("slow")), (0, 0));
    // Shown for as long as it stands, the longest first.
    let shown = |seconds| -> Vec<String> {
        let stuck = steps.stuck(after(seconds));
        stuck.into_iter().map(|it| it.step).collect()
    };
    assert_eq!(shown(11), ["quick"]);
    assert_eq!(shown(90), ["quick", "slow"]);

    drop(quick);
    assert_eq!(shown(11), [""; 0]);
    assert_eq!((steps.found("quick"), steps.stuck_now("quick")), (1, 0));
    drop(slow);
    assert_eq!(shown(90), [""; 0]);
}

#[test]
fn progress_and_rest_are_no_standing() {
    let steps = Steps::new();
    let step = steps.enter(QUICK, "a reader", "x");
    assert_eq!(steps.look(after(5)).stuck.len(), 1);
    std::thread::sleep(Duration::from_millis(5));
    step.begin();
    let look = steps.look(after(0));
    assert_eq!((look.stuck.len(), look.moved), (0, vec!["quick"]));
    assert_eq!(steps.stuck_now("quick"), 0);
    step.rest();
    assert_eq!(steps.look(after(1000)), Look::default());
    step.begin();
    assert_eq!(steps.look(after(5)).stuck.len(), 1, "told of anew");
    assert_eq!((steps.found("quick"), steps.stuck_now("quick")), (2, 1));
}

#[test]
fn too_many_steps_are_counted_and_not_watched() {
    let steps = Steps::new();
    let all: Vec<_> = (0..MOST + 3).map(|it| steps.enter(QUICK, "", it)).collect();
    assert_eq!(steps.look(after(5)).stuck.len(), MOST);
    assert_eq!(steps.stuck(after(5)).len(), MOST_NAMED);
    let mut registry = prometheus_client::registry::Registry::default();
    steps.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "unwatched_steps_total 3",
        "stuck_steps_total{step=\"quick\"} 8192",
        "stuck_steps_now{step=\"quick\"} 8192",
    ] {
        assert!(text.contains(line), "{text}");
    }
    drop(all);
    assert_eq!(steps.stuck_now("quick"), 0);
    let _room = steps.enter(QUICK, "", "z");
    assert_eq!(steps.stuck(after(5)).len(), 1);
}

#[test]
fn what_another_process_says_replaces_what_it_said_before() {
    let steps = Steps::new();
    let told = |pid, id| Stuck {
        pid,
        id,
        step: "reader".into(),
        whom: "a process".into(),
        subject: "z".into(),
        stands: Duration::from_secs(40),
    };
    let state = || (steps.found("reader"), steps.stuck_now("reader"));
    steps.hear(vec![told(1, 0), told(1, 1)]);
    assert_eq!(state(), (2, 2));
    steps.hear(vec![told(1, 1)]);
    assert_eq!(state(), (2, 1));
    // Its successor counts anew.
    steps.hear(vec![told(2, 1)]);
    assert_eq!(state(), (3, 1));
    let stands = steps.stuck(after(10))[0].stands;
    assert!(stands >= Duration::from_secs(49), "{stands:?}");
    assert_eq!(steps.stuck_here(after(10)), []);
    steps.hear(Vec::new());
    assert_eq!((state(), steps.stuck(after(10)).len()), ((3, 0), 0));
}

#[test]
fn the_watchdog_finds_what_blocks_a_thread() {
    let steps = Steps::new();
    let watchdog = Watchdog::start(steps.clone()).unwrap();
    let kind = StepKind::new("blocked", Duration::from_millis(1));
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let blocked = steps.clone();
    let thread = std::thread::spawn(move || {
        let _step = blocked.enter(kind, "a test", "a channel");
        ended.recv().unwrap_err();
    });
    let begun = Instant::now();
    while steps.stuck_now("blocked") == 0 {
        assert!(begun.elapsed() < Duration::from_secs(30), "not found");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(end);
    thread.join().unwrap();
    assert_eq!((steps.found("blocked"), steps.stuck_now("blocked")), (1, 0));
    drop(watchdog);
}
