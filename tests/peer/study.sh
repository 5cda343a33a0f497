#!/bin/sh
# The mini study with its teacher behind `pipe serve`, killed in the middle: what is asked, what is kept, what comes out.
#
#     sh tests/peer/study.sh target/release/pipe
#
# Needs curl. About five minutes on two cores: the study is computed twice, once with the teacher in the process.
set -eu
PIPE=$(realpath "$1")
ROOT=$(realpath "$(dirname "$0")/../..")
WORK=$(mktemp -d)
SERVER=
trap '[ -z "$SERVER" ] || kill "$SERVER" 2>/dev/null || true; rm -rf "$WORK"' EXIT
cp -r "$ROOT/pipelines" "$WORK/"
cd "$WORK"
fails() { echo "FAIL $*"; exit 1; }
kept() { cat served/journal/*.jsonl 2>/dev/null | wc -l; }
given() { curl -s "$URL/../metrics" | sed -n 's/.*chat.completions",status="200"} //p'; }

"$PIPE" run pipelines/table1.toml --profile mini --cache alone -q > alone.txt 2> alone.log
"$PIPE" serve pipelines/table1.toml teacher --profile mini --cache alone --port 0 --json -q > served.json 2> server.log &
SERVER=$!
while [ ! -s served.json ]; do sleep 0.1; done
URL=$(sed 's/.*"url":"\([^"]*\)".*/\1/' served.json)

DEEPSEEK_API_KEY=a-secret-of-this-script
export DEEPSEEK_API_KEY
# No value holds a blank.
SET="--set endpoint.deepseek.url=$URL --set endpoint.deepseek.model=teacher --set endpoint.deepseek.max_concurrency=4"
OPTIONS="--profile mini --profile api --cache served $SET"
study() {
    command=$1
    shift
    # shellcheck disable=SC2086
    "$PIPE" "$command" pipelines/table1.toml $OPTIONS "$@"
}
# shellcheck disable=SC2086
"$PIPE" run pipelines/table1.toml $OPTIONS r1k > first.txt 2> first.log &
RUN=$!
while [ "$(kept)" -lt 150 ]; do sleep 0.02; done
kill -9 "$RUN"
wait "$RUN" 2>/dev/null || true
BEFORE=$(kept) GIVEN=$(given)
echo "killed: $BEFORE of 1200 replies are in the journal, $GIVEN were given"
LEFT=$(study plan inverted | sed -n 's/.* \([0-9,]*\) calls of .*replies are there.*/\1/p')
echo "the plan counts $LEFT calls that are left of the first 600"
[ "$LEFT" = $((600 - BEFORE)) ] || fails "the plan"
study run r1k > second.txt 2> second.log || fails "the second run: $(cat second.log)"
AFTER=$(kept) NOW=$(given)
echo "run again: $AFTER replies are in the journal, $NOW were given"
[ "$AFTER" = 1200 ] || fails "not every reply is kept"
# Beside them: one word to try the key, and those that were on their way to the killed process.
[ $((NOW - GIVEN)) -le $((1200 - BEFORE + 1)) ] || fails "something was asked twice"
study run r1k > third.txt 2> third.log
[ "$(kept)" = 1200 ] && [ "$(given)" = "$NOW" ] || fails "a third run asks"
study run > served.txt 2> served.log || fails "the study: $(cat served.log)"
cmp alone.txt served.txt || fails "the tables differ"
echo "the table is the one of the teacher in the process, byte for byte"
[ "$(grep -rl "$DEEPSEEK_API_KEY" served ./*.log ./*.txt | wc -l)" = 0 ] || fails "the key is somewhere on disk"
echo "all as they should be"
