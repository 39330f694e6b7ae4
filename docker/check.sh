#!/bin/bash
# Builds the image and runs it, with buildah and without a daemon: docker/check.sh [FOLDER]
#
# Needs root, Debian's buildah, debootstrap and iproute2, and a python3 with pip and PyYAML. The base
# is a Debian that is made here, or the image that BASE_IMAGE names. pip has the same settings in the
# build as here; TORCH_INDEX is the Dockerfile's. FOLDER keeps the base and the image for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."

work=${1:-$(mktemp --directory)}
mkdir --parents "$work"
names=("harness-$$-0" "harness-$$-1") # of network namespaces
image=localhost/harness

step() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    tail --lines=40 "$work"/*.log >&2
    exit 1
}

tool() { buildah --root "$work/storage" --runroot "$work/state" --storage-driver vfs "$@"; }

config() { tool inspect --type image --format "{{$1}}" "$image"; }

list() { config "range $1}}{{println .}}{{end" | sed '/^$/d'; }

tidy() {
    local code=$?
    trap - EXIT
    for pid in $(jobs -p); do ! pid=$(first_process "$pid") || kill -KILL "$pid"; done
    wait
    for name in "${names[@]}"; do ip netns delete "$name" 2>/dev/null || true; done
    tool rm --all >/dev/null || true
    [ -n "${keep:-}" ] || rm --recursive --force "$work"
    exit "$code"
}
keep=${1:-}
trap tidy EXIT

# The base: a small Debian, whose Python is new enough.
make_base() {
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        bookworm "$work/debian" >"$work/debootstrap.log" || fail "debootstrap"
    local container
    container=$(tool from scratch)
    tool copy --quiet "$container" "$work/debian" / >/dev/null
    tool commit --quiet --rm "$container" localhost/debian >/dev/null
    rm --recursive --force "$work/debian"
}

# pip's settings here as a pip.conf, and `--volume` options for the folders and files that it names.
pip_options() {
    python3 -m pip config list | sed --quiet --regexp-extended "s/^(global|:env:)\.([^=]*)='(.*)'$/\2=\3/p" |
        sort --unique --field-separator== --key=1,1 | sed '1i [global]' >"$work/pip.conf"
    printf '%s\n' "--volume=$work/pip.conf:/etc/pip.conf:ro"
    # An index in a folder `simple` leads to files beside it.
    grep --only-matching --extended-regexp '(^|[= ]|file://)/[^ ]+' "$work/pip.conf" |
        sed --regexp-extended 's,^[= ]?(file://)?,,; s,/simple/?$,,' | sort --unique |
        while read -r path; do printf '%s\n' "--volume=$path:$path:ro"; done
}

build() {
    local options
    mapfile -t options < <(pip_options)
    # A pip that has folders or indexes of its own finds torch there.
    if grep --quiet --extended-regexp '^(find-links|extra-index-url|index-url)=' "$work/pip.conf"; then
        TORCH_INDEX=${TORCH_INDEX-}
    fi
    [ -z "${TORCH_INDEX+set}" ] || options+=("--build-arg=TORCH_INDEX=$TORCH_INDEX")
    tool build --isolation chroot --format docker --file docker/Dockerfile --tag "$image" \
        "--build-arg=BASE_IMAGE=${BASE_IMAGE:-localhost/debian}" "${options[@]}" . \
        >"$work/build.log" 2>&1 || fail "the build"
}

# Two network namespaces with a cable between them, and names for both ends.
make_network() {
    for name in "${names[@]}"; do ip netns add "$name"; done
    ip link add eth0 netns "${names[0]}" type veth peer eth0 netns "${names[1]}"
    for node in 0 1; do
        ip -n "${names[$node]}" address add "10.89.0.$((node + 1))/24" dev eth0
        ip -n "${names[$node]}" link set eth0 up
        ip -n "${names[$node]}" link set lo up
    done
    printf '127.0.0.1 localhost\n10.89.0.1 node0\n10.89.0.2 node1\n' >"$root/etc/hosts"
}

# container NODE COMMAND...: with the image's entry point, user, environment and working directory, in
# namespaces of its own. The script's $1 and $2 are expanded inside.
container() {
    # shellcheck disable=SC2016
    local node=$1 begin='
        hostname "$1"
        mount --rbind /dev "$2/dev"
        mount --types tmpfs tmpfs "$2/dev/shm"
        shift
        exec unshare --root="$1" --mount-proc --wd="$workdir" --setgid="$user" --setuid="$user" \
            env --ignore-environment "${@:2}"'
    shift
    user=$user workdir=$workdir ip netns exec "${names[$node]}" \
        unshare --mount --uts --ipc --pid --fork --kill-child \
        bash -c "$begin" container "node$node" "$root" "${environment[@]}" "${entrypoint[@]}" "$@"
}

# The first process of the container that job PID runs.
first_process() {
    local pid=$1
    until [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = tini ]; do pid=$(pgrep --parent "$pid") || return 1; done
    echo "$pid"
}

# healthy PID: whether the health check passes in the container that job PID runs.
healthy() {
    local pid
    pid=$(first_process "$1") || return 1
    nsenter --target "$pid" --all --root --wd --setgid "$user" --setuid "$user" \
        env --ignore-environment "${environment[@]}" "${health[@]}" >>"$work/health.log" 2>&1
}

# until_training PID LOG: waits, for 5 minutes at most, until the container is healthy and has trained.
until_training() {
    for _ in $(seq 100); do
        ! healthy "$1" || ! grep --quiet 'INFO step [0-9]*/' "$2" || return 0
        kill -0 "$1" 2>/dev/null || fail "a container ended before it was healthy"
        sleep 3
    done
    fail "a container was not healthy in time"
}

# node NODE WORD...: the environment and command of a node in compose.yaml, and more words.
node() {
    local words
    mapfile -t words < <(python3 -c '
import sys, yaml
node = yaml.safe_load(open("docker/compose.yaml"))["services"][sys.argv[1]]
print(*(f"{key}={value}" for key, value in node["environment"].items()), *node["command"], sep="\n")
' "node$1")
    container "$1" env "${words[@]}" "${@:2}"
}

# start_nodes WORD...: both nodes, as jobs `first` and `second`.
start_nodes() {
    node 0 --trainer.eval_every=0 "$@" >"$work/node0.log" 2>&1 &
    first=$!
    node 1 --trainer.eval_every=0 "$@" >"$work/node1.log" 2>&1 &
    second=$!
}

# checkpoints: how many are saved.
checkpoints() { find "$runs/byte_lm/checkpoints" -name manifest.json | wc --lines; }

[ -n "${BASE_IMAGE:-}" ] || tool inspect --type image localhost/debian >/dev/null 2>&1 || make_base
step "the base is ready"
build
step "built: $(tool images --format '{{.Size}}' "$image")"

root=$(tool mount "$(tool from "$image")")
user=$(config .OCIv1.Config.User)
user=${user%%:*}
workdir=$(config .OCIv1.Config.WorkingDir)
runs=$root$workdir/runs
mapfile -t environment < <(list .OCIv1.Config.Env && echo HOME=/home/trainer)
mapfile -t entrypoint < <(list .OCIv1.Config.Entrypoint)
mapfile -t command < <(list .OCIv1.Config.Cmd)
mapfile -t health < <(list .Docker.Config.Healthcheck.Test | sed 1d) # without the word CMD
make_network

[ "$(container 0 id --user)" = 10001 ] || fail "it runs as $(container 0 id --user)"
! container 0 sh -c "command -v gcc cc g++ make" || fail "it holds a compiler"
container 0 "${command[@]}" --run.steps=20 >"$work/train.log" 2>&1 || fail "20 steps"
step "the default task: $(grep --only-matching 'step 20: eval loss.*' "$work/train.log")"

container 0 "${command[@]}" --run.steps=1000000 >"$work/stop.log" 2>&1 &
until_training $! "$work/stop.log"
grep --quiet "no rank has begun" "$work/health.log" || fail "it was healthy before it had begun"
kill -TERM "$(first_process $!)"
code=0
wait $! || code=$?
[ "$code $(checkpoints)" = "143 2" ] || fail "SIGTERM: exit code $code, $(checkpoints) checkpoints"
step "resumed, healthy, and on SIGTERM saved: exit code $code"

rm --recursive "$runs/byte_lm"
start_nodes --run.steps=1000000
until_training "$first" "$work/node0.log"
until_training "$second" "$work/node0.log" # rank 0's log
kill -TERM "$(first_process "$second")"
! wait "$first" || fail "node 0 exited with 0"
! wait "$second" || fail "node 1 exited with 0"
[ "$(checkpoints)" = 1 ] || fail "two nodes: $(checkpoints) checkpoints"
step "two nodes, and SIGTERM to one: $(grep --only-matching 'saved .*' "$work/node0.log")"

saved=$(sed 's/step-0*//' "$runs/byte_lm/checkpoints/latest")
start_nodes --run.steps=$((saved + 2))
wait "$first" || fail "node 0"
wait "$second" || fail "node 1"
step "two nodes again: $(grep --only-matching 'step .* on 2 ranks' "$work/node0.log")"

start_nodes --run.steps=1000000 --run.timeout_s=60
until_training "$first" "$work/node0.log"
kill -KILL "$(first_process "$second")"
! wait "$first" || fail "node 0 exited with 0 without node 1"
! wait "$second" || fail "node 1 was not killed"
step "two nodes, one of them killed: the other one has exited"

python3 -m pip install --quiet --constraint constraints.txt --target "$root/opt/pytest" \
    pytest pytest-timeout >"$work/pip.log" 2>&1 || fail "pytest"
cp --recursive tests pyproject.toml "$root$workdir"
environment+=(PYTHONPATH=/opt/pytest PYTHONDONTWRITEBYTECODE=1)
container 0 python -m pytest -p no:cacheprovider -q \
    tests/config/test_config.py tests/distributed/test_distributed.py \
    'tests/launch/test_launch.py::test_every_front_under_every_launcher[torchrun]' \
    >"$work/pytest.log" 2>&1 || fail "the tests"
step "the tests: $(tail --lines=1 "$work/pytest.log")"
