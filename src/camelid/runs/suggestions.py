"""Suggestions for a recipe field that does not exist: other systems call many fields by other names."""

import difflib
import re
from collections.abc import Iterable

OTHER_NAMES = {
    # axolotl, LitGPT, torchtune and transformers.TrainingArguments; without "-", "_" and the case of letters.
    "optimizer.learning_rate": "lr learningrate maxlearningrate peaklr",
    "optimizer.name": "optim optimizertype optimizername",
    "optimizer.schedule": "lrscheduler lrschedulertype scheduler lrschedule lrdecaystyle",
    "optimizer.warmup_ratio": "warmupratio warmupfraction lrwarmupfraction lrwarmupratio",
    "optimizer.warmup_steps": "warmup numwarmupsteps lrwarmupsteps lrwarmupiters warmupiters",
    "optimizer.beta1": "adambeta1",
    "optimizer.beta2": "adambeta2",
    "optimizer.eps": "adamepsilon adameps epsilon",
    "optimizer.weight_decay": "wd weightdecay",
    "optimizer.clip_norm": "maxgradnorm maxnorm gradclip clipgrad clipgradnorm gradientclipping gradientclipval",
    "optimizer.final_fraction": "minlr minlrratio cosineminlrratio",
    "optimizer.decay_steps": "lrdecayiters lrdecaysteps",
    "data.batch_size": "batchsize bs globalbatchsize trainbatchsize perdevicetrainbatchsize microbatchsize mbs",
    "data.sequence_length": "maxlength maxseqlength maxseqlen seqlength seqlen sequencelen maxlen blocksize cutofflen",
    "data.train": "dataset datasets datasetname dataspath datapath datafiles trainfile traindata",
    "data.validation": "evaldataset validationfile validationdata testdatasets",
    "data.packing": "samplepacking packed packsequences",
    "train.steps": "steps maxsteps numsteps totalsteps trainiters maxiters maxstepsperepoch trainingsteps",
    "train.accumulate": "gradientaccumulationsteps gradaccum accumulategradbatches gradientaccumulation",
    "train.log_every": "loggingsteps loginterval logeverynsteps logfreq",
    "train.checkpoint_every": "savesteps saveinterval saveeverynsteps checkpointinterval savefreq",
    "train.keep_checkpoints": "savetotallimit keepcheckpoints",
    "train.evaluate_every": "evalsteps evalinterval valinterval evaluatesteps",
    "train.milestones_every": "savemilestonefreq milestonefreq keepperiod",
    "train.keep_best": "loadbestmodelatend savebest savetopk",
    "checkpoint.dtype": "floatdtype",
    "checkpoint.optimizer": "saveoptimizerstate saveoptimizer",
    "samples.prompts": "sampleprompts evalprompts",
    "train.trackers": "reportto logger usewandb wandb",
    "dpo.beta": "beta dpobeta prefbeta rlbeta",
    "dpo.loss": "losstype prefloss",
    "dpo.label_smoothing": "dpolabelsmoothing",
    "loss.z": "zloss zlossweight zlossmultiplier",
    "loss.label_smoothing": "labelsmoothing labelsmoothingfactor",
    "dropout.embedding": "embeddingdropout embdpdrop embdropout",
    "dropout.attention": "attentiondropout attnpdrop attndropout",
    "dropout.residual": "residualdropout residuedropout residpdrop residdropout hiddendropout",
    "dropout.mlp": "mlpdropout feedforwarddropout ffndropout",
    "dropout.forgetful_min_ratio": "fcmminratio",
    "dropout.forgetful_max_ratio": "fcmmaxratio",
    "compute.dtype": "dtype bf16 fp16 precision mixedprecision torchdtype",
    "compute.remat": "remat gradientcheckpointing activationcheckpointing activationcheckpoint recompute",
    "compute.attention": "flashattention flashattn useflashattention attnimplementation",
    "lora.rank": "r lorar lorarank",
    "lora.alpha": "loraalpha",
    "lora.dropout": "loradropout",
    "lora.targets": "targetmodules loratargets loratargetmodules loraattnmodules layerstotransform excludemodules",
    "lora.kind": "usedora",
    "lora.rank_stabilized": "userslora",
    "mesh.tensor": "tensorparallel tensormodelparallelsize tensorparallelsize tp",
    "mesh.data": "dataparallel dataparallelsize dp",
    "init": "basemodel modelnameorpath modelname checkpointdir pretrainedmodel loadcheckpoint",
    "run": "outputdir outdir outputfolder savedir",
    "tokenizer": "tokenizername tokenizerpath tokenizernameorpath",
}
FIELD_OF = {name: field for field, names in OTHER_NAMES.items() for name in names.split()}
DATASET_STATE = frozenset(["loaddatasetstate", "datasetstate"])
EPOCHS = frozenset(["epochs", "epoch", "numepochs", "numtrainepochs", "trainepochs", "maxepochs"])


def suggest(field: str, known: Iterable[str]) -> str:
    """Advice for the unknown field `field`, a dotted name, in a table whose fields are `known`."""
    table, _, name = field.rpartition(".")
    plain = name.replace("_", "").replace("-", "").lower()
    if plain in EPOCHS:
        return "A run is measured in steps: set train.steps. `camelid data inspect RECIPE.toml` shows the repeats."
    if plain in DATASET_STATE:
        return "A run keeps its place in the data: the same command resumes it with the next batch."
    if plain in FIELD_OF and table.partition(".")[0] != "model":
        return f"Did you mean {FIELD_OF[plain]!r}?"
    known = list(known)
    if near := difflib.get_close_matches(name, known, 1):
        nearest = f"{table}.{near[0]}" if table else near[0]
        return f"Did you mean {nearest!r}?"
    return f"It has {', '.join(known)}."


def as_option(advice: str) -> str:
    """Advice that suggests a field, with the option of the command line that overrides it."""
    return re.sub(r"Did you mean '([\w.]+)'\?", lambda match: f"Did you mean --{match[1].replace('_', '-')}?", advice)
