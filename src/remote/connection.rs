//! The ways to the endpoints of a process.

use super::endpoint::Endpoint;
use super::gate::{Gate, Pace};
use super::journal::Journal;
use super::lock::lock;
use super::send::Sender;
use crate::problem::Problem;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

/// Every endpoint of a process.
pub struct Remote {
    folder: PathBuf,
    offline: bool,
    pace: Pace,
    connections: Mutex<HashMap<String, Arc<Connection>>>,
}

impl Remote {
    /// `folder`: where journals are.
    pub fn new(folder: &Path) -> Remote {
        Remote { folder: folder.to_path_buf(), offline: false, pace: Pace::default(), connections: Mutex::default() }
    }

    /// Asks nobody: what the journals do not have is missing.
    pub fn offline(mut self, offline: bool) -> Remote {
        self.offline = offline;
        self
    }

    /// Waits as it says, so that tests need not.
    pub fn pace(mut self, pace: Pace) -> Remote {
        self.pace = pace;
        self
    }

    /// The way to an endpoint, the same for all who ask it. Reads its key; `Err` if it is not there.
    pub fn connection(&self, endpoint: &Endpoint) -> Result<Arc<Connection>, Problem> {
        let known = serde_json::to_string(endpoint).unwrap_or_default();
        let mut connections = lock(&self.connections);
        if let Some(connection) = connections.get(&known) {
            return Ok(connection.clone());
        }
        let sender = if self.offline { None } else { Some(Sender::new(endpoint)?) };
        let connection = Arc::new(Connection {
            gate: Gate::new(endpoint, self.pace.clone()),
            journal: Journal::new(&self.folder, &endpoint.model),
            endpoint: endpoint.clone(),
            sender,
            probed: Mutex::new(self.offline),
            asked: Mutex::default(),
            answered: Condvar::new(),
        });
        connections.insert(known, connection.clone());
        Ok(connection)
    }
}

/// The way to one endpoint.
pub struct Connection {
    pub(super) endpoint: Endpoint,
    /// `None`: nobody is to be asked.
    pub(super) sender: Option<Sender>,
    pub(super) gate: Gate,
    pub(super) journal: Journal,
    /// The server answered before, or nobody is to be asked.
    pub(super) probed: Mutex<bool>,
    /// Keys of requests under way: whoever wants the same waits for the reply.
    pub(super) asked: Mutex<HashSet<String>>,
    pub(super) answered: Condvar,
}
