#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a cable (a veth pair), on which README.md's lines for torchrun
# and SLURM train the drawn streets together with gloo; then the same run once more on one host with two processes, and
# all compared. As on Debian and Ubuntu each host's own name is a loopback address, and no variable names an interface.
#
#     tests/two_hosts.sh          needs root and Linux; skips with a reason (exit 0) where namespaces cannot be made
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
. utils/environment.sh
choose_python requirements.txt
work=$(mktemp -d)
one=acf$$a two=acf$$b

clean_up() {
    local pids
    pids=$(jobs -p)
    [ -z "$pids" ] || kill $pids 2>/dev/null || true
    ip netns delete $one 2>/dev/null || true
    ip netns delete $two 2>/dev/null || true
    rm -rf "$work" /etc/netns/$one /etc/netns/$two
    rmdir /etc/netns 2>/dev/null || true
}
trap clean_up EXIT

if ! ip netns add $one 2>"$work/why" || ! ip netns add $two 2>"$work/why" ||
    ! ip link add veth_$one netns $one type veth peer name veth_$two netns $two 2>"$work/why"; then
    echo "skipped: no network namespaces here ($(tail -n 1 "$work/why"))"
    exit 0
fi
for host in "$one 10.77.0.1 $two 10.77.0.2" "$two 10.77.0.2 $one 10.77.0.1"; do
    set -- $host
    ip -n "$1" address add "$2/24" dev "veth_$1"
    ip -n "$1" link set "veth_$1" up
    ip -n "$1" link set lo up
    mkdir -p "/etc/netns/$1"        # `ip netns exec` shows what is in there as /etc
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n%s %s\n' "$1" "$4" "$3" >"/etc/netns/$1/hosts"
done
unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME
export OMP_NUM_THREADS=1 PYTHON one two

on() {              # HOST WORDS...  on a host, which knows its own name
    ip netns exec "$1" unshare --uts bash -c 'hostname "$0" && exec "$@"' "$@"
}
export -f on

# What README.md's lines call: torchrun of this Python, and stand-ins for SLURM's commands.
mkdir "$work/bin"
cat >"$work/bin/torchrun" <<'END'
#!/usr/bin/env bash
exec "$PYTHON" -m torch.distributed.run "$@"
END
cat >"$work/bin/scontrol" <<'END'
#!/usr/bin/env bash
[ "$*" = "show hostnames" ] && echo $one && echo $two
END
cat >"$work/bin/srun" <<'END'
#!/usr/bin/env bash
[ "$1 $2" = "--ntasks-per-node 1" ] || exit 9
shift 2
export SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE="1(x2)" \
    SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST SLURM_LAUNCH_NODE_IPADDR=10.77.0.1 SLURM_LOCALID=0
SLURM_NODEID=1 SLURM_PROCID=1 on $two "$@" &
SLURM_NODEID=0 SLURM_PROCID=0 on $one "$@" && wait $!
END
chmod +x "$work"/bin/*
export PATH=$work/bin:$PATH

"$PYTHON" -m dataset.streets "$work/streets" --train 8 --val 2 --size 128,256 --seed 0 >/dev/null
words="train.py --data-dir $work/streets --gpu cpu --backbone eca_resnet18 --model acfnet_resnet --input-size 65,65 \
    --batch-size 4 --num-workers 0 --num-steps 6 --log-every 1 --amp off --random-mirror --ohem 1 --ohem-keep 2000 \
    --val-every 6"

readme_line() {     # COMMAND FOLDER  the line that begins so, for one process per host
    tr '\n' ' ' <README.md | grep -o "\`$1 -[^\`]*\`" | tr -d '\`' | tr -s ' ' | sed "s|FIRST_HOST|10.77.0.1|
        s|--nproc-per-node 4|--nproc-per-node 1|; s|train.py \.\.\.|$words --snapshot-dir $2|"
}

echo "two hosts by torchrun"
line=$(readme_line torchrun "$work/second")
on $two bash -c "${line/--node-rank 0/--node-rank 1}" >"$work/second.log" 2>&1 &
second=$!
on $one bash -c "$(readme_line torchrun "$work/first")"
wait $second || { cat "$work/second.log"; exit 1; }
sent=$(ip -n $one -s link show veth_$one | awk '/TX:/ { getline; print $1 }')

echo "two hosts by SLURM's srun"
export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=$one,$two SLURM_NNODES=2 SLURM_NTASKS_PER_NODE=1
on $one bash -c "$(readme_line srun "$work/slurm")" >"$work/slurm.log" 2>&1 || { cat "$work/slurm.log"; exit 1; }

echo "one host with two processes"
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 $words --snapshot-dir "$work/together" \
    >"$work/together.log" 2>&1 || { cat "$work/together.log"; exit 1; }

"$PYTHON" - "$work" "$sent" <<'EOF'
import json
import sys
from pathlib import Path

work, sent = Path(sys.argv[1]), int(sys.argv[2])
by_torchrun, by_slurm, together = (
    [json.loads(line)["loss"] for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    for name in ("first", "slurm", "together"))
for losses in (by_torchrun, by_slurm):
    assert len(losses) == len(together) == 6, (losses, together)
    assert max(abs(a - b) / b for a, b in zip(losses, together, strict=True)) < 1e-4, (losses, together)
assert not (work / "second").exists(), "the second host wrote, too"
assert sent > 100e6, f"only {sent} bytes went over the cable"
print(f"two hosts trained together, by torchrun and by srun: losses {together[0]:.4f} to {together[-1]:.4f}, within "
      f"1e-4 of one host with two processes; {sent / 1e6:.0f} MB went over the cable from the first by torchrun")
EOF

# By the wrong interface they meet, but do not reach each other: one sentence on each host.
cat >"$work/join.py" <<'END'
from datetime import timedelta

import torch

from utils.common import command
from utils.parallel import launch

launch.MEET_TIMEOUT = timedelta(seconds=60)
command.run(lambda: launch.join_processes(torch.device("cpu")))
END
join() {            # HOST RANK
    WORLD_SIZE=2 RANK=$2 LOCAL_WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=10.77.0.1 MASTER_PORT=29512 GLOO_SOCKET_IFNAME=lo \
        PYTHONPATH=. on "$1" timeout --signal KILL 200 "$PYTHON" "$work/join.py" >"$work/$2.log" 2>&1
}
echo "two hosts by the wrong interface"
join $two 1 &
second=$!
join $one 0 && statuses=0 || statuses=$?
wait $second && statuses="$statuses 0" || statuses="$statuses $?"
for rank in 0 1; do
    sentences=$(grep "^error: " "$work/$rank.log" | grep -c "MASTER_ADDR 10.*GLOO_SOCKET_IFNAME.*NCCL_SOCKET_IFNAME" ||
        true)
    if [ "$statuses" != "2 2" ] || [ "$sentences" != 1 ] || grep -q Traceback "$work/$rank.log"; then
        echo "expected exit status 2 and one sentence on each host, found $statuses and on host $rank:"
        cat "$work/$rank.log"
        exit 1
    fi
done
echo "both end with status 2 and one sentence: $(grep "^error: " "$work/0.log")"
