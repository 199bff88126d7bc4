#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a cable (a veth pair), each running torchrun with gloo,
# train the drawn streets together; then the same run again on one host with two processes, and the two compared.
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
    rm -rf "$work"
}
trap clean_up EXIT

if ! ip netns add $one 2>"$work/why" || ! ip netns add $two 2>"$work/why" ||
    ! ip link add veth_$one netns $one type veth peer name veth_$two netns $two 2>"$work/why"; then
    echo "skipped: no network namespaces here ($(tail -n 1 "$work/why"))"
    exit 0
fi
for host in "$one 10.77.0.1" "$two 10.77.0.2"; do
    set -- $host
    ip -n "$1" address add "$2/24" dev "veth_$1"
    ip -n "$1" link set "veth_$1" up
    ip -n "$1" link set lo up
done

"$PYTHON" -m dataset.streets "$work/streets" --train 8 --val 2 --size 128,256 --seed 0 >/dev/null
words=(train.py --data-dir "$work/streets" --gpu cpu --backbone eca_resnet18 --model acfnet_resnet --input-size 65,65
    --batch-size 4 --num-workers 0 --num-steps 6 --log-every 1 --amp off --random-mirror --ohem 1 --ohem-keep 2000
    --val-every 6)
export OMP_NUM_THREADS=1

torchrun_on() {     # HOST RANK FOLDER
    GLOO_SOCKET_IFNAME=veth_$1 ip netns exec "$1" "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 \
        --node-rank "$2" --master-addr 10.77.0.1 --master-port 29511 "${words[@]}" --snapshot-dir "$3"
}

torchrun_on $two 1 "$work/second" >"$work/second.log" 2>&1 &
second=$!
torchrun_on $one 0 "$work/first"
wait $second || { cat "$work/second.log"; exit 1; }
sent=$(ip -n $one -s link show veth_$one | awk '/TX:/ { getline; print $1 }')
GLOO_SOCKET_IFNAME=lo "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 "${words[@]}" \
    --snapshot-dir "$work/together" >"$work/together.log" 2>&1 || { cat "$work/together.log"; exit 1; }

"$PYTHON" - "$work" "$sent" <<'EOF'
import json
import sys
from pathlib import Path

work, sent = Path(sys.argv[1]), int(sys.argv[2])
losses = [[json.loads(line)["loss"] for line in (work / name / "metrics.jsonl").read_text().splitlines()]
          for name in ("first", "together")]
assert len(losses[0]) == len(losses[1]) == 6, losses
assert max(abs(a - b) / b for a, b in zip(*losses, strict=True)) < 1e-4, losses
assert not (work / "second").exists(), "the second host wrote, too"
assert sent > 100e6, f"only {sent} bytes went over the cable"
print(f"two hosts trained together: losses {losses[0][0]:.4f} to {losses[0][-1]:.4f}, within 1e-4 of one host with two "
      f"processes; {sent / 1e6:.0f} MB went over the cable from the first")
EOF
