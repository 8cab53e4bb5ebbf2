// What attention must do with requests in every layout.
#pragma once

#include "attention_problem.h"

namespace attention_test {

const std::vector<Layout> kLayouts = {Layout::Right, Layout::Left, Layout::Packed, Layout::Paged};

// Every layout gives what the double reference says, and each request the same bits in all of them and alone, whether
// tiles are split or not.
template <class T>
void check(const char* what, const std::vector<Request>& requests, const Rules& rules, int schedules,
           const std::vector<Layout>& layouts = kLayouts, bool alone = false) {
  std::vector<int> ids(requests.size());
  for (size_t i = 0; i < ids.size(); i++) ids[i] = int(i);
  under_schedules(schedules, what, [&](const std::string& schedule) {
    std::vector<Result<T>> first;
    for (const Layout layout : layouts) {
      const auto got = run<T>(requests, ids, rules, layout, layout == Layout::Left || layout == Layout::Paged);
      for (size_t i = 0; i < requests.size(); i++) {
        const std::string where = schedule + ", " + kLayoutNames[int(layout)] + ", request " + std::to_string(i);
        if (first.empty())
          check_request(got[i], requests[i], ids[i], rules, where);
        else
          expect(same_results(got[i], first[i]), "the same bits", [&] { return where; });
      }
      if (first.empty()) first = got;
    }
    for (size_t i = 0; alone && i < requests.size(); i++) {
      const auto got = run<T>({requests[i]}, {ids[i]}, rules, Layout::Packed, true);
      expect(same_results(got[0], first[i]), "the same bits alone", [&] { return schedule + std::to_string(i); });
    }
  });
}

}  // namespace attention_test
