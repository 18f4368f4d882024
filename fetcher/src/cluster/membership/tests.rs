// SPDX-License-Identifier: Apache-2.0
//! Memberships over an in-memory transport and a paused clock, and some over UDP on loopback.

use std::collections::BTreeMap;
use std::sync::Mutex;

use chitchat::transport::ChannelTransport;
use tokio::net::UdpSocket;

use super::*;
use crate::cluster::node::{NodeId, Role};

/// The largest datagram.
const MTU: usize = 65_507;

fn address(number: u8) -> SocketAddr {
    ([10, 0, 0, number], 9641).into()
}

fn node(id: &str, address: SocketAddr) -> Node {
    Node {
        id: NodeId::parse(id).unwrap(),
        zone: "z".into(),
        rack: "r-1".into(),
        role: Role::Node,
        address,
        version: "0.1.0".into(),
        protocol: 1,
        load: 0,
        free_slots: 16,
    }
}

fn options(listen: SocketAddr, seeds: &[&str]) -> MembershipOptions {
    MembershipOptions {
        listen,
        discovery: Discovery::Gossip,
        seeds: seeds
            .iter()
            .map(|seed| Seed::parse(seed).unwrap())
            .collect(),
        seed_file: None,
        remembered: Vec::new(),
        allow: Allow::default(),
        metrics: ClusterMetrics::new(),
    }
}

/// Nodes that gossip in memory. What is not stopped ends with the runtime.
struct Net {
    transport: ChannelTransport,
    stop: CancellationToken,
}

impl Net {
    fn new() -> Self {
        Net {
            transport: ChannelTransport::with_mtu(MTU),
            stop: CancellationToken::new(),
        }
    }

    fn start_with(&self, options: MembershipOptions, me: Node) -> Membership {
        let transport = Arc::new(self.transport.clone());
        Membership::start_over(transport, options, me, &self.stop).unwrap()
    }

    /// Node `n<number>` with the first one as its seed.
    fn start(&self, number: u8) -> Membership {
        let options = options(address(number), &["10.0.0.1:9641"]);
        self.start_with(options, node(&format!("n{number}"), address(number)))
    }

    async fn start_all(&self, count: u8) -> Vec<Membership> {
        let nodes: Vec<_> = (1..=count).map(|number| self.start(number)).collect();
        for node in &nodes {
            until(node, 30, |view| view.others.len() == usize::from(count) - 1).await;
        }
        nodes
    }

    async fn links(&self, from: &[u8], to: &[u8], whole: bool) {
        for from in from {
            for to in to {
                let (from, to) = (address(*from), address(*to));
                if whole {
                    self.transport.add_link(from, to).await;
                } else {
                    self.transport.remove_link(from, to).await;
                }
            }
        }
    }
}

fn others(membership: &Membership) -> Vec<String> {
    let view = membership.view();
    let view = view.borrow();
    view.others.iter().map(|node| node.id.to_string()).collect()
}

/// How long it took until a view was as wanted; fails after so many seconds.
async fn until(membership: &Membership, seconds: u64, wanted: impl Fn(&View) -> bool) -> Duration {
    let begun = Instant::now();
    let mut view = membership.view();
    let found = view.wait_for(|view| wanted(view));
    let found = tokio::time::timeout(Duration::from_secs(seconds), found).await;
    assert!(
        matches!(found, Ok(Ok(_))),
        "within {seconds} s, not {:?}",
        others(membership)
    );
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_node_by_itself_has_a_view_of_itself() {
    let me = node("me", address(1));
    let alone = Membership::alone(me.clone());
    let mut view = alone.view();
    assert_eq!(**view.borrow_and_update(), View::alone(me));
    alone.set_load(50, 1);
    alone.stop().await;
    let waited = tokio::time::timeout(Duration::from_secs(60), view.changed()).await;
    assert!(waited.is_err(), "the view stays and is not closed");
}

#[tokio::test(start_paused = true)]
async fn five_nodes_with_one_seed_know_each_other_and_what_they_are() {
    let net = Net::new();
    let mut first = node("n1", address(1));
    (first.zone, first.rack, first.role) = ("y".into(), String::new(), Role::Supernode);
    (first.protocol, first.load, first.free_slots) = (3, 20, 7);
    let mut nodes = vec![net.start_with(options(address(1), &[]), first.clone())];
    nodes.extend((2..=5).map(|number| net.start(number)));
    for (number, node) in nodes.iter().enumerate() {
        let took = until(node, 20, |view| view.others.len() == 4).await;
        println!("node {} knew all after {took:?}", number + 1);
    }
    for (number, membership) in nodes.iter().enumerate().skip(1) {
        let number = u8::try_from(number).unwrap() + 1;
        let view = Arc::clone(&membership.view().borrow());
        assert_eq!(view.me, node(&format!("n{number}"), address(number)));
        assert_eq!(view.others[0], first);
        assert_eq!(view.others.iter().filter(|it| it.rack == "r-1").count(), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_crashes_is_gone_soon() {
    let net = Net::new();
    let nodes = net.start_all(5).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    net.links(&[3], &[1, 2, 4, 5], false).await;
    let begun = Instant::now();
    for number in [0, 1, 3, 4] {
        until(&nodes[number], 15, |view| view.others.len() == 3).await;
        println!("node {} knew after {:?}", number + 1, begun.elapsed());
        assert!(!others(&nodes[number]).contains(&"n3".to_owned()));
    }
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(3), "too hasty: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_leaves_is_gone_at_once() {
    let net = Net::new();
    let nodes = net.start_all(8).await;
    let begun = Instant::now();
    nodes[3].stop().await;
    let stopped = begun.elapsed();
    for number in [0, 1, 2, 4, 5, 6, 7] {
        until(&nodes[number], 5, |view| view.others.len() == 6).await;
        assert!(!others(&nodes[number]).contains(&"n4".to_owned()));
    }
    println!(
        "stopped after {stopped:?}, all knew after {:?}",
        begun.elapsed()
    );
    assert!(stopped <= STOP_DEADLINE);
    assert!(begun.elapsed() <= Duration::from_secs(4));
}

#[tokio::test(start_paused = true)]
async fn halves_of_a_cluster_meet_again() {
    let net = Net::new();
    let nodes = net.start_all(5).await;
    // The second time for longer than the dead are remembered: then the seed brings them together.
    for apart in [60, 1500] {
        net.links(&[1, 2], &[3, 4, 5], false).await;
        for (number, left) in [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)] {
            until(&nodes[number], 20, |view| view.others.len() == left).await;
        }
        tokio::time::sleep(Duration::from_secs(apart)).await;
        net.links(&[1, 2], &[3, 4, 5], true).await;
        let begun = Instant::now();
        for node in &nodes {
            until(node, 60, |view| view.others.len() == 4).await;
        }
        println!("{apart} s apart, whole after {:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_started_anew_replaces_itself() {
    let net = Net::new();
    let nodes = net.start_all(3).await;
    // A crash: nobody is told.
    net.links(&[3], &[1, 2], false).await;
    nodes[2].stop().await;
    // Generations are wall time, which does not stand still.
    std::thread::sleep(Duration::from_millis(5));
    let mut again = node("n3", address(33));
    again.role = Role::Leech;
    let third = net.start_with(options(address(33), &["10.0.0.1:9641"]), again.clone());
    for node in &nodes[..2] {
        until(node, 10, |view| view.others.contains(&again)).await;
        assert_eq!(others(node).len(), 2, "one of that name");
    }
    until(&third, 10, |view| view.others.len() == 2).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    for node in &nodes[..2] {
        assert!(node.view().borrow().others.contains(&again));
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_started_anew_is_never_alone_and_forgets_who_is_gone() {
    let net = Net::new();
    let nodes = net.start_all(2).await;
    let start = |number: u8, seeds: &[&str]| {
        let mut options = options(address(number), seeds);
        options.remembered = [1, 2, 9]
            .map(|it| node(&format!("n{it}"), address(it)))
            .into();
        net.start_with(options, node(&format!("n{number}"), address(number)))
    };
    // The only seed is dead: what it remembers leads it to the others.
    let third = start(3, &["10.0.0.9:9641"]);
    assert_eq!(others(&third), ["n1", "n2", "n9"], "at once");
    let begun = Instant::now();
    for node in &nodes {
        until(node, 5, |view| view.others.len() == 2).await;
    }
    until(&third, 15, |view| view.others.len() == 2).await;
    assert_eq!(others(&third), ["n1", "n2"]);
    let took = begun.elapsed();
    assert!((SETTLE..SETTLE * 3 / 2).contains(&took), "{took:?}");
    // Nobody is left of those that it remembers.
    for node in &nodes {
        node.stop().await;
    }
    third.stop().await;
    let fourth = start(4, &[]);
    assert_eq!(others(&fourth).len(), 3);
    until(&fourth, 15, |view| view.others.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn two_nodes_of_one_name_keep_their_own_views() {
    let net = Net::new();
    let nodes = net.start_all(2).await;
    std::thread::sleep(Duration::from_millis(5));
    let mut thief = node("n1", address(9));
    thief.role = Role::Leech;
    let thief = net.start_with(options(address(9), &["10.0.0.2:9641"]), thief);
    let is_thief = |view: &View| view.others[0].role == Role::Leech;
    until(&nodes[1], 10, is_thief).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    for node in [&nodes[0], &thief] {
        assert_eq!(others(node), ["n2"]);
    }
    assert_eq!(nodes[0].view().borrow().me.role, Role::Node);
    // Others follow the younger one, all alike, and do not waver.
    assert_eq!(others(&nodes[1]), ["n1"]);
    assert!(is_thief(&nodes[1].view().borrow()));
}

#[tokio::test(start_paused = true)]
async fn load_is_told_when_it_matters_and_not_too_often() {
    let net = Net::new();
    let nodes = net.start_all(2).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mut view = nodes[1].view();
    view.mark_unchanged();
    nodes[0].set_load(5, 15);
    let waited = tokio::time::timeout(Duration::from_secs(30), view.changed()).await;
    assert!(waited.is_err(), "a little load is not told");
    nodes[0].set_load(150, 0);
    let full = |view: &View| (view.others[0].load, view.others[0].free_slots) == (100, 0);
    let took = until(&nodes[1], 5, full).await;
    println!("load was known after {took:?}");
    assert_eq!(nodes[0].view().borrow().me.load, 100);
    // Many changes a second become one: the last.
    let mut changes = 0;
    view.mark_unchanged();
    for step in 0..1000 {
        nodes[0].set_load(if step % 2 == 0 { 0 } else { 60 }, 8);
        tokio::time::sleep(Duration::from_millis(10)).await;
        changes += usize::from(view.has_changed().unwrap());
        view.mark_unchanged();
    }
    assert!(changes <= 11, "{changes} in 10 s");
    until(&nodes[1], 5, |view| view.others[0].load == 60).await;
}

#[tokio::test(start_paused = true)]
async fn nodes_of_other_networks_are_not_heard() {
    let net = Net::new();
    let mut guarded = options(address(1), &[]);
    guarded.allow = Allow::new(vec!["10.0.0.0/29".parse().unwrap()]);
    let guarded = net.start_with(guarded, node("n1", address(1)));
    let near = net.start(2);
    let far = net.start_with(
        options(address(200), &["10.0.0.1", "10.0.0.2"]),
        node("n200", address(200)),
    );
    until(&near, 10, |view| view.others.len() == 2).await;
    until(&far, 10, |view| view.others.len() == 2).await;
    until(&guarded, 10, |view| view.others.len() == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    // The far one is known to the near one, which may speak of it; it counts for nobody who may not.
    assert_eq!(others(&guarded), ["n2"]);
    assert_eq!(others(&near), ["n1", "n200"]);
}

#[tokio::test(start_paused = true)]
async fn seeds_come_from_files_and_names_at_any_time() {
    let net = Net::new();
    let home: SocketAddr = "127.0.0.1:9641".parse().unwrap();
    let first = net.start_with(options(home, &[]), node("n1", home));
    // `localhost` resolves to the first node's address.
    let options_of = |number, seeds: &[&str]| options(address(number), seeds);
    let seeds = ["localhost", "no-such-name.invalid:1"];
    let second = net.start_with(options_of(2, &seeds), node("n2", address(2)));
    until(&second, 30, |view| view.others.len() == 1).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("seeds");
    let mut with_file = options_of(3, &[]);
    with_file.seed_file = Some(file.clone());
    let third = net.start_with(with_file, node("n3", address(3)));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(others(&third).is_empty());
    std::fs::write(&file, "10.0.0.2\n").unwrap();
    until(&third, 30, |view| view.others.len() == 2).await;
    until(&first, 30, |view| view.others.len() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn an_address_that_is_taken_is_tried_again() {
    let net = Net::new();
    let _first = net.start(1);
    let taken = net.transport.open(address(2)).await.unwrap();
    let second = net.start(2);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(others(&second).is_empty());
    drop(taken);
    until(&second, 15, |view| view.others.len() == 1).await;
}

#[test]
fn zones_and_racks_are_names() {
    for (zone, rack, good) in [("z", "", true), ("", "r", false), ("z", "a b", false)] {
        let mut me = node("me", address(1));
        (me.zone, me.rack) = (zone.into(), rack.into());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let _guard = runtime.enter();
        let started = Membership::start_over(
            Arc::new(ChannelTransport::default()),
            options(address(1), &[]),
            me,
            &CancellationToken::new(),
        );
        assert_eq!(started.is_ok(), good, "{zone:?} {rack:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_nodes_of_a_static_list_are_those_that_answer() {
    // What each address answers; `None`: it does not, or never ends.
    let answers: Arc<Mutex<BTreeMap<SocketAddr, Option<Node>>>> = Arc::default();
    let set = |number: u8, answer: Option<Node>| {
        answers.lock().unwrap().insert(address(number), answer);
    };
    let asked = Arc::clone(&answers);
    let hello: Hello = Arc::new(move |whom: Asked| {
        assert_eq!(whom.name, None);
        let answer = asked.lock().unwrap().get(&whom.address).cloned();
        Box::pin(async move {
            match answer {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        })
    });
    let seeds = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"];
    let mut options = options(address(1), &seeds);
    options.discovery = Discovery::Static(hello);
    set(1, Some(node("n1", address(1))));
    // Says that it is elsewhere, but is reached where it was asked.
    set(2, Some(node("n2", address(99))));
    set(3, None);
    let mut wrong = node("n5", address(5));
    wrong.zone = "no zone".into();
    set(5, Some(wrong));
    let membership = Net::new().start_with(options, node("n1", address(1)));
    until(&membership, 10, |view| view.others.len() == 1).await;
    let view = Arc::clone(&membership.view().borrow());
    assert_eq!(view.others, [node("n2", address(2))]);

    set(3, Some(node("n3", address(3))));
    until(&membership, 10, |view| view.others.len() == 2).await;
    // Two failures are an accident.
    set(2, None);
    tokio::time::sleep(ASK_EVERY * 2).await;
    set(2, Some(node("n2", address(2))));
    tokio::time::sleep(ASK_EVERY * 4).await;
    assert_eq!(others(&membership), ["n2", "n3"]);
    answers.lock().unwrap().remove(&address(2));
    let took = until(&membership, 20, |view| view.others.len() == 1).await;
    println!("a silent node was left out after {took:?}");
    set(2, Some(node("n2", address(2))));
    until(&membership, 10, |view| view.others.len() == 2).await;
    membership.stop().await;
}

/// An address of its own on loopback, so that tests do not take each other's ports.
fn loopback(number: u8) -> SocketAddr {
    let process = std::process::id().to_le_bytes();
    ([127, process[0] | 1, process[1], number], 9641).into()
}

fn udp(number: u8, seed: SocketAddr) -> (Membership, CancellationToken, ClusterMetrics) {
    let stop = CancellationToken::new();
    let me = node(&format!("u{number}"), loopback(number));
    let options = options(loopback(number), &[&seed.to_string()]);
    let metrics = options.metrics.clone();
    (
        Membership::start(options, me, &stop).unwrap(),
        stop,
        metrics,
    )
}

/// Whether a view was empty within that time.
async fn until_empty(membership: &Membership, within: Duration) -> bool {
    let mut view = membership.view();
    let empty = view.wait_for(|view| view.others.is_empty());
    tokio::time::timeout(within, empty).await.is_ok()
}

#[tokio::test]
async fn two_nodes_find_each_other_over_udp_and_one_leaves() {
    let (first, stop, _) = udp(1, loopback(1));
    let (second, _stop, _) = udp(2, loopback(1));
    for node in [&first, &second] {
        let took = until(node, 30, |view| view.others.len() == 1).await;
        println!("known after {took:?}");
    }
    // Cancelling is enough; stop waits for what it does.
    stop.cancel();
    first.stop().await;
    until(&second, 6, |view| view.others.is_empty()).await;
    second.stop().await;
}

/// The parts of a `chitchat` message.
fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend(u16::try_from(text.len()).unwrap().to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn stranger(bytes: &mut Vec<u8>) {
    text(bytes, "stranger");
    bytes.extend(1u64.to_le_bytes());
    bytes.extend([4, 127, 0, 0, 1, 1, 0]);
}

#[tokio::test]
async fn a_datagram_that_ends_the_server_costs_a_moment() {
    let (first, _stop, metrics) = udp(3, loopback(3));
    let (second, _stop, _) = udp(4, loopback(3));
    until(&first, 30, |view| view.others.len() == 1).await;
    let liar = UdpSocket::bind((loopback(5).ip(), 0)).await.unwrap();
    let header = |kind: u8| {
        let mut bytes = 45_139u16.to_le_bytes().to_vec();
        bytes.extend([0, kind]);
        bytes
    };
    for junk in [&b""[..], b"x", &[0; 1000], &header(0), &header(9)] {
        liar.send_to(junk, loopback(3)).await.unwrap();
    }
    // SYN: makes a stranger known.
    let mut syn = header(0);
    syn.extend(1u16.to_le_bytes());
    stranger(&mut syn);
    for number in [1u64, 0, 0] {
        syn.extend(number.to_le_bytes());
    }
    text(&mut syn, "sluice");
    liar.send_to(&syn, loopback(3)).await.unwrap();
    let mut answer = [0; 2048];
    let answered = tokio::time::timeout(Duration::from_secs(5), liar.recv(&mut answer)).await;
    answered.unwrap().unwrap();
    // ACK: a value of the stranger's with a version that is then taken back, which upstream asserts never
    // happens.
    let mut operations = vec![0];
    stranger(&mut operations);
    operations.extend([0u64.to_le_bytes(), 0u64.to_le_bytes()].concat());
    operations.push(1);
    text(&mut operations, "k");
    text(&mut operations, "v");
    operations.extend(100u64.to_le_bytes());
    operations.push(0);
    operations.push(2);
    operations.extend(50u64.to_le_bytes());
    let mut ack = header(2);
    ack.push(2);
    ack.extend(u16::try_from(operations.len()).unwrap().to_le_bytes());
    ack.extend(operations);
    ack.push(0);
    liar.send_to(&ack, loopback(3)).await.unwrap();
    // Gossip begins anew, and meanwhile nobody is missed.
    let missed = until_empty(&first, Duration::from_secs(20)).await;
    assert!(!missed);
    assert_eq!(metrics.gossip_failures(), 1);
    assert_eq!(others(&first), ["u4"]);
    until(&second, 30, |view| view.others.len() == 1).await;
    first.stop().await;
    second.stop().await;
}
