"""What the client's page shows to those without Python: curl and JavaScript, made from the description of the service.

`python -m serving.examples` prints it. A test compares the page with it, and runs it as it stands there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from ope.data import InputError
from serving.openapi import described


class Example(NamedTuple):
    """A request: the operation's id, what stands in its path, and its body."""

    operation: str
    path: Mapping[str, str]
    body: Mapping[str, Any]


ASKED = {"unit": "user-7", "context": {"device": "phone"}}

POINT = {"decision_point": "ad-load"}

DEFAULT = "ads-2"
"""The default action of the decision point."""

DECIDE = Example("decide", POINT, {"decision_id": "order-2", **ASKED})

REWARD = Example("report_a_reward", {}, {"decision_id": "order-2", "name": "value", "value": 0.25})

SHOWN = Example("report_what_was_shown", {"decision_id": "order-2"}, {"action": "ads-1"})

UNSERVED = Example(
    "report_an_unserved_decision", POINT, {"decision_id": "order-3", **ASKED, "action": DEFAULT, "reason": "timeout"}
)

CURL = """\
URL=http://127.0.0.1:8349
KEY=$(python3 -c 'import json; print(json.load(open("shop.json"))["key"])')
{calls}"""

JAVASCRIPT = """\
import {{ randomUUID }} from "node:crypto";

const {{ URL: url, KEY: key }} = process.env;
const headers = {{ Authorization: `Bearer ${{key}}`, "Content-Type": "application/json", "Propel-Deadline-Ms": "500" }};

// the request is at fault, and a repeat would be refused, too
class Refused extends Error {{
  constructor(status, detail) {{
    super(`${{status}}: ${{detail}}`);
    this.status = status;
  }}
}}

/** The answer, or null where none came. Every try sends the same bytes: under one id, a repeat is answered as the first was. */
async function ask(path, request) {{
  const body = JSON.stringify(request);
  for (let retry = 0; retry < 3; retry++) {{
    if (retry > 0) await new Promise((wake) => setTimeout(wake, Math.random() * 50 * 2 ** retry));
    try {{
      const answer = await fetch(url + path, {{ method: "POST", headers, body, signal: AbortSignal.timeout(500) }});
      if (answer.ok) return await answer.json();
      if (answer.status < 500 && answer.status !== 429) throw new Refused(answer.status, await answer.text());
    }} catch (error) {{
      if (error instanceof Refused) throw error;
    }}
  }}
  return null;
}}

const request = {{ decision_id: randomUUID(), ...{asked} }};
const served = await ask("{decide}", request);
const decision = served ?? {{ decision_id: request.decision_id, action: "{default}" }};
console.log(decision.action, served ? "decided" : "by default"); // what comes of it is worth 0.25

const {{ decision_id, action, token }} = decision;
if (!served) {{
  // a service that decided, and whose answer was lost, refuses the report: then it is told what was shown
  await ask("{unserved}", {{ ...request, action, reason: "no answer" }}).catch((error) => {{
    if (error.status !== 409) throw error;
    return ask(`{shown}`, {{ action }});
  }});
}}
const rewarded = await ask("{reward}", {{ decision_id, token, name: "value", value: 0.25 }});
console.log(rewarded ? rewarded.state : "to be sent again");"""


def request(document: Mapping[str, Any], example: Example) -> tuple[str, str]:
    """Path and body of an example. Raises InputError where the description has no such operation, or other fields."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if operation["operationId"] == example.operation:
                _check(document, operation, example)
                return path.format(**example.path), json.dumps(example.body)
    raise InputError(f"found no operation {example.operation!r}; expected one that is described: name the one it became")


def _check(document: Mapping[str, Any], operation: Mapping[str, Any], example: Example) -> None:
    """Raise InputError where an example's body does not have the fields that are described."""
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schema = document["components"]["schemas"][name]
    found, known, required = set(example.body), set(schema["properties"]), set(schema["required"])
    if not required <= found <= known:
        raise InputError(f"{example.operation}: found {sorted(found)}; expected {sorted(required)} and none but {sorted(known)}")


def curl(document: Mapping[str, Any]) -> str:
    """Commands."""
    calls = []
    for example in (DECIDE, REWARD, SHOWN, UNSERVED):
        path, body = request(document, example)
        calls.append(f'curl -s -m 1 -H "Authorization: Bearer $KEY" "$URL{path}" \\\n    -d \'{body}\'')
    return CURL.format(calls="\n".join(calls))


def javascript(document: Mapping[str, Any]) -> str:
    """A program for Node 18 and later."""
    named = SHOWN._replace(path={"decision_id": "${decision_id}"})
    examples = (("decide", DECIDE), ("unserved", UNSERVED), ("shown", named), ("reward", REWARD))
    paths = {name: request(document, one)[0] for name, one in examples}
    return JAVASCRIPT.format(**paths, asked=json.dumps(ASKED), default=DEFAULT)


def markdown() -> str:
    """Both, as they stand on the page."""
    document = described({})
    return f"```sh\n{curl(document)}\n```\n\n```js\n{javascript(document)}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
