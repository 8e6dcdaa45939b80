#!/usr/bin/env bash
# What RDMA and GPUDirect do between this machine and another: one JSON file to send us.
#
#   bench/rdma_report.sh HOST [OUT]    HOST by ssh, with `loraserve` on its PATH; OUT: rdma_report.json
#   bench/rdma_report.sh local [OUT]   both ends on this machine
#
# Every byte that is read is checked. Host names, cards, drivers and library versions are in the file;
# keys and addresses that could be used afterwards are not. LORASERVE names the command here and there
# (loraserve); LORASERVE_UCX_PREFIX, where it is set, goes along to HOST.
#
# Exit code 1 where a doctor found something missing or the reads failed; the last lines on stderr say
# what, and the report is written all the same.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
host=$1
out=${2:-rdma_report.json}
loraserve=${LORASERVE:-loraserve}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

there() {  # a command on the other machine
  if [ "$host" = local ]; then bash -c "$1"; else ssh "$host" "$1"; fi
}
prefix=${LORASERVE_UCX_PREFIX:+LORASERVE_UCX_PREFIX=$(printf %q "$LORASERVE_UCX_PREFIX") }
facts='
echo "== kernel"; uname -a
echo "== limits"; ulimit -l
echo "== rdma"; ls /sys/class/infiniband /dev/infiniband
echo "== ibv_devinfo"; ibv_devinfo
echo "== ucx"; "${LORASERVE_UCX_PREFIX:-/usr}/bin/ucx_info" -v -d
echo "== gpu"; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; nvidia-smi topo -m
echo "== modules"; grep -E "^(nvidia_peermem|nvidia|gdrdrv|mlx5_ib|efa) " /proc/modules'

# A part that fails is a finding: the report says so and goes on to the next one.
part() {  # NAME COMMAND...: stdout, stderr and exit status
  local name=$1 rc=0
  shift
  "$@" >"$work/$name.out" 2>"$work/$name.err" || rc=$?
  echo "$rc" >"$work/$name.rc"
  echo "rdma_report: $name: exit $rc" >&2
}
read_offer() {
  there "$prefix$loraserve node doctor --offer" |
    timeout 300 "$loraserve" node doctor --read-from - --gpudirect
}
part here_facts bash -c "$facts"
part there_facts there "$prefix bash -c $(printf %q "$facts")"
part here_doctor "$loraserve" node doctor --json --gpudirect
part there_doctor there "$prefix$loraserve node doctor --json"
part reads read_offer

python3 - "$work" "$out" <<'PY'
import json
import pathlib
import sys

work, out = map(pathlib.Path, sys.argv[1:])
report = {"loraserve_rdma_report": 1}
for rc in sorted(work.glob("*.rc")):
    text = rc.with_suffix(".out").read_text(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = text.splitlines()
    errors = rc.with_suffix(".err").read_text(errors="replace").splitlines()
    report[rc.stem] = {"exit": int(rc.read_text()), "found": found, "stderr": errors[-200:]}
out.write_text(json.dumps(report, indent=1) + "\n")
print(f"rdma_report: {out}", file=sys.stderr)

# Facts may fail: what a machine lacks has no command that tells of it.
failed = [name for name in ("here_doctor", "there_doctor", "reads") if report[name]["exit"]]
for name in failed:
    part = report[name]
    checks = part["found"] if isinstance(part["found"], list) else []
    lacks = [c for c in checks if isinstance(c, dict) and c.get("ok") is False]
    told = [f"{check['name']}: {check['detail']}" for check in lacks] or part["stderr"][-1:]
    why = "; ".join(told) or "it says nothing"
    print(f"rdma_report: FAILED: {name}, exit {part['exit']}: {why}", file=sys.stderr)
sys.exit(1 if failed else 0)
PY
