"""A sample of timm's architectures, one of every kind, and the table of the rest."""

import json
import logging
import re

import pytest
from architectures import TABLE, check, has_convs, row_of, timm_models

pytestmark = pytest.mark.filterwarnings('ignore')  # timm's and torch's own, of some of these architectures

# Plain, grouped, depthwise and mixed convs; experts; one- and three-dimensional and transposed convs; weight
# standardisation, with gains; LayerScale; norms of every kind and none; conv, MLP and several classifiers; tied
# weights; constant buffers; attention beside convs.
SAMPLE = [
    *(
        'resnet18',
        'regnetx_002',
        'mobilenetv3_small_050',
        'mixnet_s',
        'efficientnet_cc_b0_4e',
        'tf_efficientnet_lite0',
    ),
    *('eca_resnext26ts', 'lambda_resnet26t', 'lowformer_b0', 'resnetv2_18', 'nf_regnet_b0', 'convnext_atto'),
    *('convnextv2_atto', 'resnet26t', 'densenet121', 'dla46_c', 'levit_conv_128s', 'repvit_m0_9', 'coat_lite_tiny'),
    *('efficientformer_l1', 'edgenext_xx_small', 'hrnet_w18_small', 'selecsls42', 'ghostnet_050', 'rexnet_100'),
    *('fastvit_t8', 'poolformer_s12', 'test_vit2', 'csatv2', 'starnet_s1', 'mobileone_s0', 'visformer_tiny'),
    *('test_efficientnet_evos', 'resnetv2_50d_frn'),
]


@pytest.mark.parametrize('name', SAMPLE)
def test_weights_are_predicted_for_an_architecture_of_every_kind(name):
    row = check(name)
    assert row['result'].startswith('predicted at '), row
    known = {row['name']: row['result'] for row in rows()}
    assert row['result'] == known.get(name, row['result']), 'at another size than ever'
    assert row['layers'] >= 1
    assert row['hypernetwork'] <= 1.1


def rows():
    return [json.loads(line) for line in TABLE.read_text().splitlines()]


def test_the_table_has_every_conv_architecture_once_and_a_reason_for_each_that_was_refused():
    found = rows()
    names = [row['name'] for row in found]
    assert len(set(names)) == len(names) > 900
    outcomes = {row['name']: row['result'] for row in found}
    assert not [name for name, result in outcomes.items() if result.startswith('failed')]
    shapes = re.compile(r'predicted at \d+x\d+|size worked out|refused: .{20,}')
    assert all(shapes.fullmatch(result) for result in outcomes.values())
    majority = [row for row in found if row.get('predicted', 0) >= 0.5]
    assert len(majority) > 700
    assert all(row['hypernetwork'] <= 1.1 for row in found if 'hypernetwork' in row)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in timm_models() if name not in SAMPLE])
def test_every_other_architecture(name, monkeypatch):
    if not has_convs(name):
        pytest.skip('has no conv beyond one that cuts images into patches')
    monkeypatch.setattr(logging.root.manager, 'disable', logging.WARNING)
    wanted = {row['name']: row['result'] for row in rows()}
    found = row_of(name)['result']
    assert not found.startswith('failed')
    assert name in wanted, 'run python tests/architectures.py'
    if wanted[name] != 'size worked out':  # where there was no time for more
        assert found == wanted[name]
