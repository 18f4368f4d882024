// SPDX-License-Identifier: Apache-2.0
//! `[notifications]` as meant. Its values are checked whether it is on or not.

use std::path::Path;

use super::written::Notifications;
use super::{Check, ConfigError, is_host};
use crate::notifications::NotificationOptions;

impl Notifications {
    /// Turns what is written into what is meant; `None` where no address is written.
    pub(super) fn validate(
        self,
        check: &Check<'_>,
    ) -> Result<Option<NotificationOptions>, ConfigError> {
        let Notifications {
            listen,
            token,
            prewarm,
            hosts,
        } = self;
        for (told, meant) in &hosts {
            check.value("notifications.hosts", told, is_host)?;
            check.value("notifications.hosts", meant, is_host)?;
        }
        if listen.is_empty() && token.is_empty() {
            return Ok(None);
        }
        let token = check.absolute("notifications.token", Path::new(&token))?;
        if listen.is_empty() {
            return Ok(None);
        }
        let listen = check.value("notifications.listen", &listen, |text| {
            text.parse()
                .map_err(|_| "want <address>:<port>, or nothing to turn it off".to_owned())
        })?;
        Ok(Some(NotificationOptions {
            listen,
            token,
            prewarm,
            hosts,
        }))
    }
}
