"""What a card asks to cite."""

EMA = """\
```bibtex
@inproceedings{ouyang2023ema,
  title     = {Efficient Multi-Scale Attention Module with Cross-Spatial Learning},
  author    = {Ouyang, Daliang and He, Su and Zhang, Guozhong and Luo, Mingzhu and Guo, Huaiyong
               and Zhan, Jian and Huang, Zhijie},
  booktitle = {ICASSP},
  pages     = {1--5},
  year      = {2023},
  doi       = {10.1109/ICASSP49357.2023.10096516}
}
```"""

TIMM = """\
```bibtex
@misc{rw2019timm,
  title  = {PyTorch Image Models},
  author = {Wightman, Ross},
  year   = {2019},
  doi    = {10.5281/zenodo.4414861}
}
```"""
