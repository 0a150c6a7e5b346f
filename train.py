"""Train, quantize and ship a low-bit language model: `python train.py`; every option is a file under configs/.

python train.py                                    the default job: 3-bit QAT of SmolLM2-135M
python train.py --help                             every group and option
python train.py method=qat scheme=w4a8 trainer.max_steps=500
python train.py -m scheme.weight.bits=2,3,4        one run for each
python train.py resume=outputs/...                 go on where a run stopped
"""

from lightning_modules.cli import main

if __name__ == "__main__":
    main()
