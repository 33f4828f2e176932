//! Messages in the words of a trace.

use vhost_remap::engine::message::{ToHealer, ToShard};

pub(crate) fn brief(message: &ToHealer) -> String {
    match message {
        ToHealer::Handed(handed) => {
            format!("handed {} {:?} {:?}", handed.request.token.0, handed.cursor.piece, handed.why)
        }
        other => format!("{other:?}"),
    }
}

pub(crate) fn brief_back(message: &ToShard) -> String {
    match message {
        ToShard::Publish { view, lift, ack } => {
            format!("publish {:?} lift {lift:?} ack {ack:?} special {}", view.mode, view.map.len())
        }
        ToShard::Handled { request, cursor, outcome } => {
            format!("handled {} {:?} {outcome:?}", request.token.0, cursor.piece)
        }
        ToShard::Withdrawn { request } => format!("withdrawn {}", request.token.0),
        other => format!("{other:?}"),
    }
}
