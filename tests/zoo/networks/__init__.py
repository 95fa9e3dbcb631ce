# SPDX-License-Identifier: Apache-2.0
"""Networks that no library here has, written out: their structure is the point, so nothing is borrowed."""

from __future__ import annotations

import torch

from tests.zoo.architectures import Architecture, image, signal, tokens
from tests.zoo.networks import classic, classifiers, dense, mixers, sequences, yolo

SHELF = (
    Architecture("alexnet", classic.AlexNet, image(64)),
    Architecture("vgg", classic.VGG, image(32)),
    Architecture("inception", classic.Inception, image(32)),
    Architecture("densenet", classic.DenseNet, image(32)),
    Architecture("squeezenet", classic.SqueezeNet, image(32)),
    Architecture("resnext", classifiers.ResNeXt, image(32)),
    Architecture("res2net", classifiers.Res2Net, image(32)),
    Architecture("shufflenet_v2", classifiers.ShuffleNetV2, image(32)),
    Architecture("efficientnet_se", classifiers.EfficientNet, image(32)),
    Architecture("ghostnet", classifiers.GhostNet, image(32)),
    Architecture("resnet_3d", classifiers.ResNet3d, lambda: (torch.randn(2, 3, 8, 16, 16),)),
    Architecture("yolo", yolo.Yolo, image(64)),
    Architecture("yolo_attention", yolo.YoloAttention, image(64)),
    Architecture("unet", dense.UNet, image(32)),
    Architecture("hrnet", dense.HRNet, image(32)),
    Architecture("fpn", dense.PyramidSegmenter, image(32)),
    Architecture("seaformer", dense.SeaFormer, image(64)),
    Architecture("super_resolution", dense.SuperResolution, image(16)),
    Architecture("mlp_mixer", mixers.MlpMixer, image(32)),
    Architecture("gmlp", mixers.GatedMlp, image(32)),
    Architecture("xcit", mixers.XCiT, image(32)),
    Architecture("vit_fused_qkv", mixers.FusedViT, image(32)),
    Architecture("talking_heads", mixers.TalkingHeads, image(32)),
    Architecture("torch_transformer", mixers.TorchTransformer, lambda: (torch.randn(2, 9, 11), torch.randn(2, 5, 11))),
    Architecture("lstm_language_model", sequences.LanguageModel, tokens(9)),
    Architecture("gru_tagger", sequences.Tagger, tokens(9)),
    Architecture("crnn", sequences.CRNN, image(16, 48, 1)),
    Architecture("conv_tasnet", sequences.ConvTasNet, signal(256, 1)),
    Architecture("tcn", sequences.TCN, signal(64, 5)),
    Architecture("wavenet", sequences.WaveNet, signal(64, 1)),
)
