-- What was shown of every decision that somebody said it of: the last word counts.
--
-- decisions(row, decision_id, action), shown(place, decision_id, action): `place` orders them by time.
select
    d.row,
    case
        when s.action is null then 'none'
        when s.action = d.action then 'as_sampled'
        else 'other'
    end as shown
from decisions as d
inner join (select decision_id, max(place) as place from shown group by decision_id) as l on l.decision_id = d.decision_id
inner join shown as s on s.place = l.place
