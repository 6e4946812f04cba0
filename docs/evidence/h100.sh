# How seeds 45 to 55 of the announced test ran on a lent H100, in two commands: bash h100.sh first DATA; bash h100.sh rest DATA
# In the current folder: "code", a checkout of 42ed167; "focus", the teacher. Runs go on after "first" has ended.
# Every seed is a reproduce.py of its own, since a tiny model keeps a core busy and the GPU idle. MPS lets them share it.
set -u
export OMP_NUM_THREADS=1 HF_DATASETS_OFFLINE=1 CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps-log
here=$PWD data=$2 seeds=$(seq 45 55)
G="--mask selfguided --guide cached --foreground border --hint random --hint-ratio 0.05 --hint-portion 0.5"
C="--relevance contrast" T="--guide-from $here/focus --guide-image-size 112"
arms=(--arm "self=$G $C --guide-start 8" --arm "self-foreground=$G --relevance foreground --guide-start 8"
    --arm "teacher=$G $C $T --guide-start 8" --arm "centre=$G --guide-from centre --guide-start 8"
    --arm "pixels=$G $C --guide-from pixels --guide-start 8" --arm "shuffled=$G $C --guide-shuffle --guide-start 8"
    --arm "amt-half=--mask amt --guide cached --guide-start 8"
    --arm "self-early=$G $C --guide-start 2" --arm "teacher-early=$G $C $T --guide-start 2")

start() { # SEED JOBS ARMS...: in a session of its own, which outlives this command
    local seed=$1 jobs=$2 tune=(--finetune none)
    shift 2
    [ "$seed" -lt 48 ] && tune=()
    (cd code && exec setsid nohup python3 reproduce.py --scale cpu --dataset "$data" --seeds "$seed" --jobs "$jobs" --arms random \
        "$@" "${tune[@]}" --pretrain "--workers 2" --probe "--workers 2" --out "$here/runs/$seed" --evidence "$here/evidence" \
        >> "$here/$seed.log" 2>&1 < /dev/null) > /dev/null 2>&1 &
}

case $1 in
first)
    nvidia-cuda-mps-control -d > /dev/null 2>&1 < /dev/null
    for seed in $seeds; do start "$seed" 1; done
    sleep 120
    ;;
rest)
    for seed in $seeds; do
        while pgrep -f "seeds $seed .*runs/$seed " > /dev/null; do sleep 1; done
        start "$seed" 2 "${arms[@]}"
    done
    while pgrep -f "reproduce.py --scale cpu" > /dev/null; do sleep 5; done
    ;;
esac
