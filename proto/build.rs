// SPDX-License-Identifier: Apache-2.0
//! Generates the Rust code of our APIs. Needs `protoc` (Debian: protobuf-compiler).
fn main() -> Result<(), Box<dyn std::error::Error>> {
    tonic_prost_build::configure().bytes(".").compile_protos(
        &[
            "proto/control.proto",
            "proto/shim.proto",
            "proto/peer.proto",
        ],
        &["proto"],
    )?;
    Ok(())
}
