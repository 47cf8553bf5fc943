// Sphinx's scores, but a guide comes before the reference: whoever searches "swap" wants to read how to swap.
var GUIDES = /^(quickstart|troubleshooting|faq|guides\/|recipes\/)/;

var Scorer = {
  score: ([docname, , , , score]) => score + (GUIDES.test(docname) ? 20 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
