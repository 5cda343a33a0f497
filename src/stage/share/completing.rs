//! Completions of all that is asked: one turn of the model each, or several where it thinks within a budget.

use crate::data::Tokenizer;
use crate::problem::Problem;
use crate::stage::context::Context;
use crate::stage::share::decoding::Decoding;
use crate::stage::share::thinking::{Thinking, Thought};
use crate::stage::share::turns::{Reply, Request, Session, Turn};

/// Completes every request, in order. Reads and extends the journal; reports progress in `unit`.
pub fn complete(
    ctx: &Context,
    decoding: &Decoding,
    tokenizer: &Tokenizer,
    requests: &[Request],
    unit: &'static str,
) -> Result<Vec<Reply>, Problem> {
    let mut session = Session::new(ctx, "model", decoding, tokenizer)?;
    session.fits(requests)?;
    match &decoding.thinking {
        Some(thinking) => think(thinking, &mut session, requests, unit),
        None => session.answers(requests, unit),
    }
}

/// Which random numbers the answer draws: others than any turn of thinking.
const ANSWER: u64 = u64::MAX;

/// Thinking under way.
struct Mind {
    ids: Vec<u32>,
    text: String,
    continued: u64,
    forced: bool,
    over: bool,
}

/// Turn by turn: every thought that is not over takes another, then all answer.
fn think(
    thinking: &Thinking,
    session: &mut Session,
    requests: &[Request],
    unit: &'static str,
) -> Result<Vec<Reply>, Problem> {
    let (decoding, tokenizer) = (session.decoding, session.tokenizer);
    let (format, stop) = (decoding.format, thinking.stop(decoding.format));
    let wait = tokenizer.encode(&thinking.wait);
    let begin = |request: &Request| {
        let none = request.budget == 0;
        Mind { ids: Vec::new(), text: String::new(), continued: 0, forced: none, over: none }
    };
    let mut minds: Vec<Mind> = requests.iter().map(begin).collect();
    for number in 0..=thinking.ignore_end {
        let open: Vec<usize> = (0..minds.len()).filter(|&i| !minds[i].over).collect();
        if open.is_empty() {
            break;
        }
        let turn = |&i: &usize| Turn {
            request: &requests[i],
            number,
            ids: [requests[i].ids.as_slice(), &minds[i].ids].concat(),
            max_tokens: requests[i].budget - minds[i].ids.len(),
        };
        let turns: Vec<Turn> = open.iter().map(turn).collect();
        let replies = session.take(&turns, &stop, "thoughts")?;
        for (&i, reply) in open.iter().zip(replies) {
            let mind = &mut minds[i];
            mind.text += &reply.text;
            (mind.forced, mind.over) = (reply.cut, true);
            if reply.cut {
                mind.ids.extend(reply.ids);
                continue;
            }
            mind.ids.extend(without_end(tokenizer, &reply));
            // What was encoded anew may have become more.
            if mind.ids.len() > requests[i].budget {
                mind.ids.truncate(requests[i].budget);
                mind.text = tokenizer.decode(&mind.ids, false);
            }
            // There has to be room to go on.
            if number < thinking.ignore_end && mind.ids.len() + wait.len() < requests[i].budget {
                mind.ids.extend(&wait);
                mind.text += &thinking.wait;
                mind.continued += 1;
                mind.over = false;
            }
        }
    }
    let bridges: Vec<String> = minds.iter().map(|mind| thinking.bridge(format, &mind.text, mind.forced)).collect();
    let before: Vec<Vec<u32>> = minds
        .iter()
        .zip(&bridges)
        .map(|(mind, bridge)| [mind.ids.clone(), tokenizer.encode(bridge)].concat())
        .collect();
    let turn = |(request, before): (_, &Vec<u32>)| {
        let request: &Request = request;
        let ids = [request.ids.as_slice(), before].concat();
        Turn { request, number: ANSWER, ids, max_tokens: decoding.max_tokens }
    };
    let turns: Vec<Turn> = requests.iter().zip(&before).map(turn).collect();
    let answers = session.take(&turns, &decoding.stop, unit)?;
    let whole = |(((mind, bridge), before), answer): (((Mind, String), Vec<u32>), Reply)| {
        let thought = Thought { tokens: mind.ids.len(), continued: mind.continued, forced: mind.forced };
        answer.behind(mind.text + &bridge, before, thought)
    };
    Ok(minds.into_iter().zip(bridges).zip(before).zip(answers).map(whole).collect())
}

/// The tokens of a turn up to the text that ended it. Where that begins inside a token, the part before it is
/// encoded anew.
fn without_end(tokenizer: &Tokenizer, reply: &Reply) -> Vec<u32> {
    for kept in (0..=reply.ids.len()).rev() {
        let ids = &reply.ids[..kept];
        if let Some(rest) = reply.text.strip_prefix(tokenizer.decode(ids, false).as_str()) {
            return [ids.to_vec(), tokenizer.encode(rest)].concat();
        }
    }
    tokenizer.encode(&reply.text)
}
