//! What stages that ask an endpoint share: messages, rounds of requests until a reply is of use, the bill.

use crate::problem::Problem;
use crate::remote::{Ask, Bill, Completion, Connection, Endpoint, Sampling, Standing};
use crate::stage::context::Context;
use serde_json::{Value, json};
use std::sync::Arc;

/// The way of one stage to one endpoint.
pub struct Asking<'a> {
    ctx: &'a Context<'a>,
    endpoint: &'a Endpoint,
    line: Arc<Connection>,
    bill: Bill,
}

/// What a reply comes to.
pub enum Taken<T> {
    Final(T),
    /// Of no use: it stands if no better one comes.
    Again(T),
}

/// Reads a reply, or why there is none: told the ask's place before it, and after it which try this is, from 1.
pub type Take<'t, T> = dyn Fn(usize, &Result<Completion, String>, u64) -> Taken<T> + 't;

impl<'a> Asking<'a> {
    pub fn new(ctx: &'a Context<'a>, endpoint: &'a Endpoint) -> Result<Asking<'a>, Problem> {
        Ok(Asking { ctx, endpoint, line: ctx.remote.connection(endpoint)?, bill: Bill::new(endpoint) })
    }

    /// What `take` makes of the reply to each ask, in order. One that it finds of no use is asked for again as another
    /// request, at most `attempts` times in all.
    pub fn ask<T>(
        &mut self,
        mut asks: Vec<Ask>,
        sampling: &Sampling,
        attempts: u64,
        unit: &'static str,
        take: &Take<T>,
    ) -> Result<Vec<T>, Problem> {
        let (ctx, total) = (self.ctx, asks.len());
        ctx.progress.begin(total as u64, unit);
        let mut taken: Vec<Option<T>> = (0..total).map(|_| None).collect();
        let mut open: Vec<usize> = (0..total).collect();
        for attempt in 0..attempts {
            open.iter().for_each(|&i| asks[i].attempt = attempt);
            let round: Vec<Ask> = open.iter().map(|&i| asks[i].clone()).collect();
            let settled = total - open.len();
            let completions = self.line.complete(&round, sampling, &mut |standing: &Standing| {
                ctx.progress.at((settled + standing.done) as u64);
                ctx.progress.note(&standing.note());
                ctx.stopped()
            })?;
            let mut again = Vec::new();
            for (&i, completion) in open.iter().zip(&completions) {
                if let Ok(completion) = completion {
                    self.bill.add(self.endpoint, completion);
                }
                taken[i] = Some(match take(i, completion, attempt + 1) {
                    Taken::Final(one) => one,
                    Taken::Again(one) => {
                        again.push(i);
                        one
                    }
                });
            }
            open = again;
            if open.is_empty() {
                break;
            }
        }
        ctx.progress.at(total as u64);
        Ok(taken.into_iter().flatten().collect())
    }

    /// What it all took.
    pub fn bill(self) -> Bill {
        if self.bill.reported_models.len() > 1 {
            let names: Vec<&str> = self.bill.reported_models.keys().map(String::as_str).collect();
            self.ctx.progress.warn(&format!("the server answered as several models: {}", names.join(", ")));
        }
        self.bill
    }
}

/// What a user says, a text or whole turns, behind the system message if there is one.
pub fn messages(user: Value, system: Option<String>) -> Value {
    let mut messages = match user {
        Value::Array(turns) => turns,
        user => vec![json!({"role": "user", "content": user})],
    };
    if let Some(system) = system {
        messages.insert(0, json!({"role": "system", "content": system}));
    }
    Value::Array(messages)
}

/// `usage.json`.
pub fn write_usage(ctx: &Context, usage: &Value) -> Result<(), Problem> {
    let path = ctx.out.join("usage.json");
    std::fs::write(&path, format!("{usage:#}\n"))
        .map_err(|error| Problem::io("stage::unwritable", "write", &path, &error))
}

/// A request that is still to be sent.
pub struct Pending {
    pub key: String,
    pub prompt_bound: u64,
    /// How often it is sent at most, the replies of all but the last not parsing.
    pub tries: u64,
}
