//! The JSON schema of what servers answer and `--json` prints.

use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::api::{Failure, ListPage};
use crate::runtime::health::HealthReport;
use crate::runtime::report::{EventPage, EventRecord, ListEntry, SCHEMA_VERSION, StatusReport};
use crate::runtime::stats::StatsReport;
use crate::runtime::surface::SurfaceReport;

/// Documents by their names in `$defs`: `StatusReport` (`status`), `StatsReport` (`stats`), `ListEntry` (a line of
/// `list`), `ListPage` (`/v1/list`), `EventRecord` (a line of `events`), `EventPage` (`/v1/events`), `HealthReport`
/// (`health`), `SurfaceReport` (`surface`) and `Failure` (each answer with a status of 400 and up). A document has no
/// version of its own where it is part of another.
pub fn schema() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    generator.subschema_for::<StatusReport>();
    generator.subschema_for::<StatsReport>();
    generator.subschema_for::<ListEntry>();
    generator.subschema_for::<ListPage>();
    generator.subschema_for::<EventRecord>();
    generator.subschema_for::<EventPage>();
    generator.subschema_for::<HealthReport>();
    generator.subschema_for::<SurfaceReport>();
    generator.subschema_for::<Failure>();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": format!("vhost-remap documents, version {SCHEMA_VERSION}"),
        "$defs": generator.take_definitions(true),
    })
}
