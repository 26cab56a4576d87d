# What the batch scripts beside this file share, which they read from the project's folder: a command that is stopped
# when the time of its job is up, and put back into the queue.
#
#     until_time_is_up COMMAND ...     runs a command; afterwards $status is its exit status, and $time_is_up says yes
#                                      if the job was told that its time is up
#     requeue NAME                     puts the job back into the queue, MAX_RESTARTS times at most

signals=0
time_is_up=
hear() {
    signals=$((signals + 1))
    kill -TERM "$pid" 2>/dev/null
}
trap 'time_is_up=yes; hear' USR1 # from --signal: save, and go on later
trap hear TERM                   # from scancel: save, and that is all

until_time_is_up() {
    "$@" &
    pid=$!
    while true; do # a signal ends `wait`, but not what it waits for
        heard=$signals
        wait "$pid"
        status=$?
        ((heard == signals)) && break
    done
}

requeue() {
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
        echo "$1: stopped and saved, but started $MAX_RESTARTS times already (MAX_RESTARTS); not queued again" >&2
        exit "$status"
    fi
    echo "$1: time is up (status $status); queued again"
    scontrol requeue "$SLURM_JOB_ID" || exit 1
}
