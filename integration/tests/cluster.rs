// SPDX-License-Identifier: Apache-2.0
//! Many daemons start one image at once, in networks of their own: what it costs the registry and them.
//!
//! Tests whose names begin with `long_` take minutes each and belong to `make soak`; they are marked as
//! ignored otherwise, and write `docs/benchmarks/cluster-real.json`.
//!
//! What holds however slow the machine is, is tested in `four_daemons_share_what_one_fetches`.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sluice_integration::cluster::burst::{Fault, Harm};
use sluice_integration::cluster::fabric::{self, Fabric, Port};
use sluice_integration::cluster::image::{Image, Published};
use sluice_integration::cluster::report::{self, Run};
use sluice_integration::cluster::{Cluster, Options, Shape};
use sluice_integration::harness::network;
use sluice_integration::harness::root::Root;

/// A lone start takes some six seconds at the usual shapes, ten at the slow one.
const LONE_DELAY: Duration = Duration::from_secs(15);
const SEAL_DEADLINE: Duration = Duration::from_secs(280);
/// Most of the CPU that a run may take, in percent, to count as a measurement of the network.
const CPU_LIMIT: f64 = 70.0;
/// How much more than a lone node a cluster may cost the registry.
const EGRESS_LIMIT: f64 = 1.05;
/// How much later than a lone node one of eight nodes may start, and one of fewer.
const START_LIMIT: f64 = 1.3;
/// How much more that is for each doubling of the nodes: no more than the logarithm of their number.
const START_LIMIT_PER_DOUBLING: f64 = 0.1;
/// Two daemons die, one of them a seed; one node is cut off from all others.
const FAULTS: [Fault; 3] = [
    Fault {
        node: 1,
        harm: Harm::Kill,
        after: Duration::from_millis(800),
        lasts: Duration::from_millis(1500),
    },
    Fault {
        node: 5,
        harm: Harm::Kill,
        after: Duration::from_millis(1600),
        lasts: Duration::from_millis(800),
    },
    Fault {
        node: 3,
        harm: Harm::CutOff,
        after: Duration::from_millis(500),
        lasts: Duration::from_secs(3),
    },
];

/// A registry with the image, and what a lone node without any cluster takes of it.
fn with_lone_run(shape: Shape, seal: bool) -> Result<(Cluster, Published, Run)> {
    with_lone_run_of(shape, seal, LONE_DELAY)
}

/// The same; background begins so long after the start.
fn with_lone_run_of(
    shape: Shape,
    seal: bool,
    delay: Duration,
) -> Result<(Cluster, Published, Run)> {
    let mut cluster = Cluster::start(1, shape, &Options::alone(delay))?;
    let image = Image::build(cluster.root().path(), "app", 1)?;
    let image = cluster.publish(&image)?;
    let mut lone = cluster.start_everywhere(&image, &[])?;
    if seal {
        cluster.wait_sealed(&mut lone, SEAL_DEADLINE)?;
    }
    lone.print(&lone);
    Ok((cluster, image, lone))
}

/// How long daemons without a cluster may take until the background completion disturbs the count.
fn delay_alone(n: usize, lone: &Run) -> Duration {
    Duration::from_secs_f64(lone.slowest_seconds() * n as f64 * 1.5 + 10.0)
}

fn ensure_cpu_had_time(run: &Run) -> Result<()> {
    ensure!(
        run.cpu.percent() < CPU_LIMIT,
        "{}: the CPU, not the network, was measured",
        run.cpu
    );
    Ok(())
}

/// What the issue asks of a cluster: each byte once, and no node later than it would be alone.
fn ensure_each_byte_once(run: &Run, lone: &Run) -> Result<()> {
    ensure_cpu_had_time(run)?;
    let explained = run.explained_bytes();
    let most = |bytes: u64| bytes as f64 * EGRESS_LIMIT + explained as f64;
    ensure!(
        run.first_output.bytes as f64 <= most(lone.first_output.bytes),
        "{} bytes until the first outputs of {} nodes; one start takes {}, faults explain {explained}",
        run.first_output.bytes,
        run.n,
        lone.first_output.bytes
    );
    let sealed = run.sealed.as_ref().context("the run was completed")?;
    ensure!(
        sealed.egress.bytes as f64 <= most(run.image_bytes),
        "{} bytes for {} complete images of {} bytes; faults explain {explained}",
        sealed.egress.bytes,
        run.n,
        run.image_bytes
    );
    let doublings = (run.n as f64).log2();
    let limit = START_LIMIT.max(1.0 + doublings * START_LIMIT_PER_DOUBLING);
    ensure!(
        run.slowest_seconds() <= lone.slowest_seconds() * limit,
        "the last of {} nodes started after {:.2} s, a lone one after {:.2} s",
        run.n,
        run.slowest_seconds(),
        lone.slowest_seconds()
    );
    Ok(())
}

/// The most starts that four nodes may cost the registry on any machine; by themselves they cost four. A
/// reader that waits too long for a home without a processor goes to the registry itself.
const FOUR_LIMIT: f64 = 2.0;

/// The short form: nothing fails and nobody reads a wrong byte while one daemon dies and one node is cut
/// off, and the nodes share what they fetch.
#[test]
fn four_daemons_share_what_one_fetches() -> Result<()> {
    let (mut cluster, image, lone) = with_lone_run(Shape::ZONE, false)?;
    cluster.regrow(4, &Options::cluster(delay_alone(4, &lone)))?;
    let [kill, _, cut] = FAULTS;
    let run = cluster.start_everywhere(&image, &[kill, cut])?;
    run.print(&lone);
    let most = lone.first_output.bytes as f64 * FOUR_LIMIT + run.explained_bytes() as f64;
    ensure!(
        run.first_output.bytes as f64 <= most,
        "{} bytes until the first outputs of {} nodes; one start takes {}, faults explain {}",
        run.first_output.bytes,
        run.n,
        lone.first_output.bytes,
        run.explained_bytes()
    );
    cluster.end()
}

/// What one node has learnt from a start, nodes that never started the image load in one burst.
#[test]
fn a_boot_list_goes_round_the_zone() -> Result<()> {
    let delay = Duration::from_secs(150);
    let options = Options {
        config: "\n[boot]\nwindow = \"5s\"\n".to_owned(),
        ..Options::cluster(delay)
    };
    let mut cluster = Cluster::start(4, Shape::ZONE, &options)?;
    let image = Image::build(cluster.root().path(), "app", 1)?;
    let image = cluster.publish(&image)?;
    cluster.start_on(&[0], &image, &[])?;
    let value = |cluster: &Cluster, node: usize, name: &str, labels: &[&str]| {
        cluster.node(node)?.metric(name, labels)
    };
    let wait = |cluster: &Cluster, node: usize, name: &str| -> Result<()> {
        let begun = Instant::now();
        while value(cluster, node, name, &[])? < 1.0 {
            let node = cluster.node(node)?;
            ensure!(
                begun.elapsed() < Duration::from_secs(90),
                "{name} is 0 still: {}",
                node.describe()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    };
    wait(&cluster, 0, "sluice_boot_lists_told_total")?;
    ensure!(value(&cluster, 0, "sluice_boot_bursts_total", &[])? == 0.0);
    let run = cluster.start_on(&[1, 2, 3], &image, &[])?;
    let mut asked = 0.0;
    for node in 1..4 {
        wait(&cluster, node, "sluice_boot_bursts_total")?;
        let given = value(&cluster, node, "sluice_boot_list_asks_total", &["given"])?;
        let taken = value(&cluster, node, "sluice_boot_lists_taken_total", &[])?;
        ensure!(
            given + taken >= 1.0,
            "node {node}: {given} given, {taken} taken"
        );
        ensure!(value(&cluster, node, "sluice_boot_loaded_chunks_total", &[])? >= 10.0);
        asked += given;
    }
    // Two of four nodes are its homes, and have it unasked.
    ensure!(asked >= 1.0);
    run.print(&run);
    cluster.end()
}

/// Holds the measuring itself to what is known: nodes that do not help each other cost N times as much.
#[test]
#[ignore = "takes minutes: make soak"]
fn long_eight_daemons_alone_cost_the_registry_eight_starts() -> Result<()> {
    let (mut cluster, image, lone) = with_lone_run(Shape::EVEN, false)?;
    cluster.regrow(8, &Options::alone(delay_alone(4, &lone)))?;
    let run = cluster.start_everywhere(&image, &FAULTS)?;
    run.print(&lone);
    ensure_cpu_had_time(&run)?;
    let starts = run.first_output.bytes as f64 / lone.first_output.bytes as f64;
    let cut = run.first_output.cut_bytes as f64 / lone.first_output.bytes as f64;
    // What the two killed daemons had got and not stored yet, they get again: a sixth of a start each.
    ensure!(
        (7.9..8.4 + cut).contains(&starts),
        "{starts} starts, {cut} of them cut"
    );
    let repeated = run.first_output.repeated_bytes as f64 / lone.first_output.bytes as f64;
    ensure!(
        (6.8..7.4 + cut).contains(&repeated),
        "{repeated} starts were repeated"
    );
    cluster.end()
}

#[test]
#[ignore = "takes minutes: make soak"]
fn long_a_cluster_fetches_each_byte_once() -> Result<()> {
    let (mut cluster, image, lone) = with_lone_run(Shape::ZONE, true)?;
    cluster.regrow(8, &Options::cluster(LONE_DELAY))?;
    let mut run = cluster.start_everywhere(&image, &[])?;
    cluster.wait_sealed(&mut run, SEAL_DEADLINE)?;
    run.print(&lone);
    ensure_each_byte_once(&run, &lone)?;
    cluster.end()
}

/// Nodes in two zones that share what they fetch cost the registry what one zone does.
#[test]
#[ignore = "takes minutes: make soak"]
fn long_two_zones_cost_the_registry_one_start() -> Result<()> {
    let (mut cluster, image, lone) = with_lone_run(Shape::ZONE, true)?;
    let options = Options {
        zones: 2,
        // The last section that is written is that of the cluster.
        config: "shared_zones = [\"*\"]\n".to_owned(),
        ..Options::cluster(LONE_DELAY)
    };
    cluster.regrow(8, &options)?;
    let mut run = cluster.start_everywhere(&image, &[])?;
    cluster.wait_sealed(&mut run, SEAL_DEADLINE)?;
    run.print(&lone);
    let mut crossed = 0.0;
    for node in cluster.nodes() {
        crossed += node.metric("sluice_fetched_bytes_total", &["source=\"other_zone\""])?;
    }
    println!(
        "between the zones: {:.2} images",
        crossed / run.image_bytes as f64
    );
    ensure_each_byte_once(&run, &lone)?;
    ensure!(
        crossed > 0.8 * run.image_bytes as f64 && crossed < 1.2 * run.image_bytes as f64,
        "{crossed} bytes went between the zones"
    );
    cluster.end()
}

#[test]
#[ignore = "takes minutes: make soak"]
fn long_faults_cost_no_more_than_they_explain() -> Result<()> {
    let (mut cluster, image, lone) = with_lone_run_of(Shape::NARROW, true, 2 * LONE_DELAY)?;
    let mut runs = Vec::new();
    for n in [8, 16] {
        cluster.regrow(n, &Options::cluster(3 * LONE_DELAY))?;
        let mut run = cluster.start_everywhere(&image, &FAULTS)?;
        cluster.wait_sealed(&mut run, SEAL_DEADLINE)?;
        run.print(&lone);
        runs.push(run);
    }
    report::write("faults", &lone, &runs)?;
    runs.iter()
        .try_for_each(|run| ensure_each_byte_once(run, &lone))?;
    cluster.end()
}

#[test]
#[ignore = "takes minutes: make soak"]
fn long_curve_of_daemons_alone() -> Result<()> {
    let (mut cluster, image, lone) = with_lone_run(Shape::SLOW_ZONE, true)?;
    let mut runs = vec![lone.clone()];
    for n in [2, 4, 8] {
        cluster.regrow(n, &Options::alone(delay_alone(n, &lone)))?;
        let run = cluster.start_everywhere(&image, &[])?;
        run.print(&lone);
        ensure_cpu_had_time(&run)?;
        runs.push(run);
    }
    report::write("alone", &lone, &runs)?;
    cluster.end()
}

/// What no cluster can do better: nodes that are held up by nothing but their own links. It says how much
/// of the limit on start times this machine takes by itself.
#[test]
#[ignore = "takes minutes: make soak"]
fn long_curve_with_a_registry_for_everyone() -> Result<()> {
    let (mut cluster, image, lone) = with_lone_run(Shape::PLENTY, true)?;
    let mut runs = vec![lone.clone()];
    for n in [2, 4, 8, 16] {
        cluster.regrow(n, &Options::alone(LONE_DELAY * 2))?;
        let run = cluster.start_everywhere(&image, &[])?;
        run.print(&lone);
        ensure_cpu_had_time(&run)?;
        runs.push(run);
    }
    report::write("plenty", &lone, &runs)?;
    cluster.end()
}

#[test]
#[ignore = "takes minutes: make soak"]
fn long_curve_of_a_cluster() -> Result<()> {
    let (mut cluster, image, lone) = with_lone_run(Shape::SLOW_ZONE, true)?;
    let mut runs = Vec::new();
    for n in [1, 2, 4, 8, 16] {
        cluster.regrow(n, &Options::cluster(LONE_DELAY * 2))?;
        let mut run = cluster.start_everywhere(&image, &[])?;
        cluster.wait_sealed(&mut run, SEAL_DEADLINE)?;
        run.print(&lone);
        runs.push(run);
    }
    // The curve is kept also when it is not what it should be.
    report::write("cluster", &lone, &runs)?;
    runs.iter()
        .try_for_each(|run| ensure_each_byte_once(run, &lone))?;
    cluster.end()
}

/// Sends on a connection, both ends in their networks; returns how long it took until all was there.
fn send(from: &Port, to: &Port, bytes: usize) -> Result<Duration> {
    let address = SocketAddr::new(to.address().into(), 7000);
    let listener = to.network().inside(|| Ok(TcpListener::bind(address)?))?;
    let patience = Duration::from_secs(1);
    let mut stream = from
        .network()
        .inside(|| Ok(TcpStream::connect_timeout(&address, patience)?))?;
    let (receiver, _) = listener.accept()?;
    receiver.set_read_timeout(Some(Duration::from_secs(10)))?;
    let start = Instant::now();
    let writer = std::thread::spawn(move || stream.write_all(&vec![7; bytes]));
    std::io::copy(&mut (&receiver).take(bytes as u64), &mut std::io::sink())?;
    writer.join().expect("no thread panics")?;
    Ok(start.elapsed())
}

#[test]
fn links_are_shaped_and_nodes_cut_off_and_healed() -> Result<()> {
    let _turn = Root::new("fabric")?;
    let fabric = Fabric::build()?;
    let registry = fabric.plug_registry(400_000_000)?;
    let [one, two] = [0, 1].map(|i| {
        let address = fabric::node_address(i)?;
        fabric.plug(&format!("n{i}"), address, 8_000_000)
    });
    let (one, two) = (one?, two?);
    // What a link lets pass at once is on top of its rate.
    let took = send(&one, &two, 1_000_000)?;
    ensure!(
        took > Duration::from_millis(800) && took < Duration::from_millis(2500),
        "1 MB at 1 MB/s took {took:?}"
    );
    fabric.cut_off(two.name())?;
    ensure!(send(&one, &two, 10).is_err() && send(&two, &one, 10).is_err());
    send(&one, &registry, 10)?;
    send(&registry, &two, 10)?;
    fabric.heal(two.name())?;
    send(&one, &two, 10)?;
    drop((one, two, registry));
    fabric.end()
}

#[test]
fn what_a_dead_test_left_is_removed() -> Result<()> {
    let _turn = Root::new("left")?;
    let mut dead = Command::new("true").spawn()?;
    dead.wait()?;
    let prefix = fabric::prefix_of(dead.id());
    let left = network::Network::create(&format!("{prefix}n0"))?;
    let mut process = left.inside(|| Ok(Command::new("sleep").arg("60").spawn()?))?;
    std::mem::forget(left);
    fabric::remove_leftovers();
    let deadline = Instant::now() + Duration::from_secs(5);
    while process.try_wait()?.is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let ended = process.try_wait()?.is_some();
    process.kill().ok();
    process.wait()?;
    ensure!(ended, "a process of the dead test still runs");
    ensure!(network::named(&prefix).is_empty(), "namespaces are left");
    Ok(())
}
