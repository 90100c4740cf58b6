"""Known advisories about the packages installed here: a report, never a failure of the build.

    python tools/audit.py [--seconds 90]

Asks pip-audit, which asks the package index's advisory database. Without a network, or without pip-audit, it
says so in one line and ends with 0 all the same: no answer is not "nothing found", and the line says which.
"""

import argparse
import importlib.util
import json
import subprocess
import sys


def ask(seconds: int) -> tuple[list[dict] | None, str]:
    "What pip-audit found for each package, or None and why it could not be asked."
    if importlib.util.find_spec("pip_audit") is None:
        return None, "pip-audit is not installed"
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    command += ["--skip-editable", "--timeout", "5"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return None, f"no answer in {seconds} s"
    except (ValueError, KeyError, OSError):
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return None, (lines or ["it said nothing"])[-1][:120]
    if not any("vulns" in p for p in packages):
        return None, f"it answered for none of {len(packages)} packages"
    return packages, ""


def report(packages: list[dict]) -> list[str]:
    "One line on all packages, then one for each advisory."
    seen = [p for p in packages if "vulns" in p]
    found = [(p, v) for p in seen for v in p["vulns"]]
    skipped = [p["name"] for p in packages if "vulns" not in p]
    lines = [
        f"advisories   {len(found)} known for {len(seen)} packages"
        + (f", {len(skipped)} not looked up" if skipped else "")
    ]
    for p, v in found:
        fixed = ", ".join(v.get("fix_versions") or []) or "no version yet"
        names = " ".join([v["id"], *v.get("aliases", [])][:2])
        lines.append(f"             {p['name']} {p['version']}: {names}; fixed in {fixed}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=90, help="how long it may take")
    packages, why = ask(parser.parse_args().seconds)
    if packages is None:
        print(f"advisories   NOT CHECKED: the advisory database could not be asked ({why})", flush=True)
    else:
        print("\n".join(report(packages)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
