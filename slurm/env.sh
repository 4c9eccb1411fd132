# Every setting of the site, for every batch script of this folder: fill it in once. It only sets variables.
#
#     source slurm/env.sh && sbatch slurm/train_xl.sh          (docs/slurm.md)
#
# The shell that submits reads it for the SBATCH_* lines, which sbatch takes where neither its command line nor a default
# of the cluster says otherwise; they win over the #SBATCH lines of the scripts. A job reads it again on its first node.
# MEGASTAR_ENV=FILE names another file than this one.

# --- who pays, and where (sbatch) ---
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100
# export SBATCH_TIMELIMIT=8:00:00      # the site's longest; a run that is cut off is requeued and goes on

# --- where megastar is installed: a virtual environment, or a container, or both empty and it is on PATH ---
MEGASTAR_VENV=${MEGASTAR_VENV-.venv}
MEGASTAR_MODULES=""                    # module load, for example "cuda/12.8 gcc/13"
MEGASTAR_SRUN=()                       # more options of srun; a container by pyxis:
# MEGASTAR_SRUN=(--container-image=/images/megastar.sqsh "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD")
MEGASTAR_PREFIX=()                     # before the command itself; a container by Apptainer:
# MEGASTAR_PREFIX=(apptainer exec --nv --bind "$PWD" /images/megastar.sif)

# --- network ---
# export RES_OPTIONS="timeout:1 attempts:3"                  # how long a name server is waited for; this is the default
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0      # the interface of the rendezvous
# export NCCL_IB_HCA=mlx5
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --- data ---
MEGASTAR_SCRATCH=${MEGASTAR_SCRATCH-}  # a disk of each node: shards read from s3:// are kept there (data.cache)
# export AWS_ENDPOINT_URL=https://s3.example.org AWS_PROFILE=project

# --- how often a job is started again ---
MEGASTAR_MAX_REQUEUES=${MEGASTAR_MAX_REQUEUES:-50}  # in all
MEGASTAR_MAX_CRASHES=${MEGASTAR_MAX_CRASHES:-3}     # in a row, with no new checkpoint between them
MEGASTAR_MAX_SIGNALS=${MEGASTAR_MAX_SIGNALS:-10}    # ends by a signal in a row, with no new checkpoint between them

# --- hosts that the trainings keep away from (RUN/bad_hosts.log) ---
MEGASTAR_BAD_HOST_CRASHES=${MEGASTAR_BAD_HOST_CRASHES:-2}  # crashes of one host after which it is excluded; 0: never
MEGASTAR_MAX_EXCLUDED=${MEGASTAR_MAX_EXCLUDED:-4}          # hosts at a time; more: the first ones are used again
